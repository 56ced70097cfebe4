"""What a checkpoint of a run holds in arrays."""

import dataclasses

import jax

from efficient_llm import typing
from efficient_llm.training import state as state_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TltState:
  """What a checkpoint holds in arrays.

  Attributes:
    step: Steps of the run.
    params: The policy's.
    opt_state: Of the policy's optimiser.
    key: Random key data of the policy's updates.
    num_updates: Of the policy.
    drafter: Training state of the drafter; None without one.
  """

  step: jax.Array
  params: typing.Params
  opt_state: typing.PyTree
  key: jax.Array
  num_updates: jax.Array
  drafter: state_lib.TrainState | None

  @property
  def policy(self) -> state_lib.TrainState:
    return state_lib.TrainState(
      step=self.num_updates,
      params=self.params,
      opt_state=self.opt_state,
      key=self.key,
    )

  @classmethod
  def of(
    cls,
    step: jax.Array,
    policy: state_lib.TrainState,
    drafter: state_lib.TrainState | None,
  ) -> 'TltState':
    """The state of a run at a step."""
    return cls(
      step=step,
      params=policy.params,
      opt_state=policy.opt_state,
      key=policy.key,
      num_updates=policy.step,
      drafter=drafter,
    )

  def after(
    self,
    policy: state_lib.TrainState,
    drafter: state_lib.TrainState | None,
  ) -> 'TltState':
    """The state one step of the run later."""
    return self.of(self.step + 1, policy, drafter)
