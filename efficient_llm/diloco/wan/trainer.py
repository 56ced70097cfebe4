"""What an island trains with: the model, its inner state and its data."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

from efficient_llm import sharding
from efficient_llm.data import iterator
from efficient_llm.diloco.wan import fragment_codec, shared_model
from efficient_llm.diloco.wan.config import IslandsConfig
from efficient_llm.diloco.wan.fragment_codec import Fragment
from efficient_llm.training import pretrain
from efficient_llm.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Step:
  """What an inner step gave.

  Attributes:
    loss: In nats a token; None if it was not finite.
    tokens: Trained on.
  """

  loss: float | None
  tokens: float


def _moved_to(state: state_lib.TrainState, at: int) -> state_lib.TrainState:
  """The state at another step of the schedule, its moments as they are."""

  def put(old: jax.Array) -> jax.Array:
    return jax.device_put(np.int32(at), old.sharding)

  def is_schedule(x: Any) -> bool:
    return isinstance(x, optax.ScaleByScheduleState)

  opt_state = jax.tree.map(
    lambda x: x._replace(count=put(x.count)) if is_schedule(x) else x,
    state.opt_state,
    is_leaf=is_schedule,
  )
  return state.replace(step=put(state.step), opt_state=opt_state)


class Trainer:
  """Makes inner steps; compiled once, its inner moments stay in memory.

  Args:
    config: The run.
    batches: Of the island's own data.
  """

  def __init__(self, config: IslandsConfig, batches: iterator.BatchIterator):
    self._batches = batches
    self._mesh = sharding.make_mesh(config.mesh)
    self._program = pretrain.build(config, self._mesh)
    with jax.set_mesh(self._mesh):
      self._state = self._program.init_state()
    self._fragments = shared_model.make_fragments(config)
    self._at = 0

  @property
  def position(self) -> int:
    """The batch after the last one trained on."""
    return int(self._batches.get_state()['next_step'])

  def begin(self, position: int) -> None:
    """Takes up a run.

    Args:
      position: Batch of the island's data to go on with.
    """
    self._batches.seek(position)

  def step(self, at: int) -> Step:
    """Makes an inner step.

    Args:
      at: Step of the run, which the learning rate follows.
    """
    if at != self._at:
      self._state = _moved_to(self._state, at)
    self._at = at + 1
    batch = sharding.to_global(
      dict(next(self._batches)), sharding=self._program.batch_sharding
    )
    with jax.set_mesh(self._mesh):
      self._state, found = self._program.train_step(self._state, batch)
    loss, tokens, finite = jax.device_get(
      [found[name] for name in ('loss', 'tokens', 'finite')]
    )
    return Step(float(loss) if finite else None, float(tokens))

  def own(self, fragment: int) -> Fragment:
    """The island's parameters, on the host."""
    with jax.set_mesh(self._mesh):
      taken = self._fragments.take(self._state.params, fragment)
    with fragment_codec.on_cpu():
      # Copies: what is on the device is overwritten by the next step.
      return {
        name: np.array(x, np.float32)
        for name, x in jax.device_get(taken).items()
      }

  def put(
    self,
    fragment: int,
    values: Fragment,
    *,
    mixing: float,
    since: Fragment | None = None,
  ) -> None:
    """Replaces the island's parameters.

    Args:
      fragment: Its number.
      values: The shared ones.
      mixing: Share of the island's own that stays.
      since: What its own were; that share of what they have moved since then is
        added. None measures it from the shared ones.
    """
    with jax.set_mesh(self._mesh):
      params = self._mixed(
        self._state.params,
        values,
        values if since is None else since,
        mixing,
        fragment=fragment,
      )
    self._state = self._state.replace(params=params)

  @functools.cached_property
  def _mixed(self) -> Any:
    fragments = self._fragments

    def mixed(
      params: Any,
      values: Fragment,
      since: Fragment,
      mixing: Any,
      *,
      fragment: int,
    ) -> Any:
      own = fragments.take(params, fragment)
      new = {
        name: x + mixing * (own[name] - since[name])
        for name, x in values.items()
      }
      # So that values that are not finite are replaced as well.
      new = {
        name: jax.numpy.where(mixing > 0, x, values[name])
        for name, x in new.items()
      }
      return fragments.put(params, fragment, new)

    shardings = jax.tree.map(
      lambda x: x.sharding, self._program.abstract_state.params
    )
    return jax.jit(
      mixed,
      static_argnames='fragment',
      donate_argnums=0,
      out_shardings=shardings,
    )
