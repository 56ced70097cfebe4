"""The policy's update: answers packed into a batch, and one compiled step."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding, typing
from efficient_llm.models import attention, transformer
from efficient_llm.models import sampling as sampling_lib
from efficient_llm.tlt import advantages as advantages_lib
from efficient_llm.tlt import batches, policy_loss
from efficient_llm.training import state as state_lib
from efficient_llm.training import step


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
  """How answers become updates.

  Attributes:
    sequence_length: Tokens in a row; at least the longest prompt and answer.
    rows_at_once: Rows whose activations are held together.
    num_updates: Updates on the answers of a step, each on its part of them.
    drop_uninformative: Leave out groups whose rewards are all equal; with
      `rollout.max_rounds` others are answered in their place.
  """

  sequence_length: int = 512
  rows_at_once: int = 4
  num_updates: int = 1
  drop_uninformative: bool = True
  policy: policy_loss.PolicyLossConfig = policy_loss.PolicyLossConfig()
  advantages: advantages_lib.AdvantageConfig = advantages_lib.AdvantageConfig()
  optimizer: optimizer_lib.OptimizerConfig = optimizer_lib.OptimizerConfig()

  def validate(self) -> None:
    """Checks ranges; raises ValueError with one line."""
    for name in ('sequence_length', 'rows_at_once', 'num_updates'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'update.{name}={getattr(self, name)} must be at least 1; raise it.'
        )
    self.policy.validate()
    self.advantages.validate()
    self.optimizer.validate()


class Updater:
  """Compiles one step for every number of answers."""

  def __init__(
    self,
    config: UpdateConfig,
    model: transformer.TransformerConfig,
    mesh: Mesh,
    *,
    sampling: sampling_lib.SamplingConfig,
    num_answers: int,
    num_steps: int,
    pad_id: int,
  ):
    """Puts loss, optimiser and shardings together; compiles nothing yet.

    Args:
      config: Checked here.
      model: The policy.
      mesh: Its devices, which share the rows.
      sampling: What the answers were drawn with.
      num_answers: Most of a step.
      num_steps: Steps of the run.
      pad_id: Of the tokenizer.
    """
    config.validate()
    self._config, self._mesh = config, mesh
    self._pad_id, self._sampling = pad_id, sampling
    platform = mesh.devices.flat[0].platform
    model = dataclasses.replace(
      model,
      attention_implementation=attention.choose(
        model.attention_implementation, platform
      ),
    )
    axes = transformer.logical_axes(model)
    self.optimizer = optimizer_lib.make_optimizer(
      config.optimizer, axes, num_steps=num_steps * config.num_updates
    )
    self._batch_sharding = sharding.batch_sharding(mesh)
    num_shards = sharding.num_shards(mesh, self._batch_sharding.spec[0])
    # Rows that are worked off together, over all devices.
    self._part_rows = -(-config.rows_at_once // num_shards) * num_shards
    self._num_parts = -(-num_answers // self._part_rows)
    shapes = jax.eval_shape(
      lambda key: state_lib.create(
        transformer.init(model, key), self.optimizer, key
      ),
      jax.random.key(0),
    )
    self._shardings = shardings = state_lib.shardings(shapes, axes, mesh)
    self.abstract_state = state_lib.abstract(shapes, shardings)
    train_step = step.make_train_step(
      policy_loss.loss_fn(model, config.policy, sampling=sampling),
      self.optimizer,
      num_microbatches=self._num_parts,
      skip_nonfinite=True,
      skip_empty=True,
    )
    self._train_step = step.jit_train_step(
      train_step, shardings, self._batch_sharding
    )
    log_probs = policy_loss.log_probs_fn(
      model, temperature=sampling.temperature
    )
    self._log_probs = jax.jit(
      log_probs,
      in_shardings=(shardings.params, self._batch_sharding),
      out_shardings=sharding.replicated(mesh),
    )

  def init_state(
    self, params: typing.Params, key: jax.Array
  ) -> state_lib.TrainState:
    """The state before the first update, on all devices.

    Args:
      params: The policy's, as `abstract_state` has them.
      key: A typed random key.
    """
    return jax.jit(
      lambda params, key: state_lib.create(params, self.optimizer, key),
      out_shardings=self._shardings,
    )(params, key)

  def update(
    self,
    state: state_lib.TrainState,
    rollouts: batches.Rollouts,
    *,
    reference_params: typing.Params | None,
  ) -> tuple[state_lib.TrainState, dict[str, float]]:
    """Updates the policy on the answers of a step.

    Where older parameters drew some of the tokens, the loss takes its ratios to
    the probabilities that the sampler drew with, for all of them.

    Args:
      state: Whose buffers are used again.
      rollouts: Without answers whose reward failed.
      reference_params: Where the loss has a divergence from a reference.
    Returns:
      The new state and metrics: those of the train step, averaged over the
      updates, and 'used', the share of answers that were trained on.
    """
    config = self._config
    if not rollouts.num_answers:
      return _skipped(state), {'used': 0.0}
    longest = self._sampling.max_new_tokens
    advantages_N = advantages_lib.advantages(
      rollouts.rewards_N,
      rollouts.groups_N,
      algorithm=config.policy.algorithm,
      config=config.advantages,
      lengths_N=rollouts.lengths_N,
      max_completion_tokens=longest,
    )
    used_N = np.ones(rollouts.num_answers, bool)
    if config.drop_uninformative:
      used_N = advantages_lib.informative(rollouts.rewards_N, rollouts.groups_N)
    share = float(used_N.mean())
    if not used_N.any():
      return _skipped(state), {'used': 0.0}
    rollouts, advantages_N = rollouts.take(used_N), advantages_N[used_N]
    old_NT = reference_NT = None
    with jax.set_mesh(self._mesh):
      if rollouts.staleness.any():
        # Older parameters drew some tokens, with these probabilities.
        old_NT = rollouts.log_probs_NT
      elif config.num_updates > 1:
        old_NT = self._log_probs_of(state.params, rollouts, advantages_N)
      if config.policy.kl_weight:
        reference_NT = self._log_probs_of(
          reference_params, rollouts, advantages_N
        )
      found = []
      # Strided, so that every part has answers of every group.
      for part in range(min(config.num_updates, rollouts.num_answers)):
        rows = np.arange(part, rollouts.num_answers, config.num_updates)
        batch = self._pack(
          rollouts.take(rows),
          advantages_N[rows],
          old_log_probs_NT=None if old_NT is None else old_NT[rows],
          reference_log_probs_NT=(
            None if reference_NT is None else reference_NT[rows]
          ),
        )
        state, metrics = self._train_step(state, self._place(batch))
        found.append(jax.device_get(metrics))
    return state, {
      **{name: float(np.mean([x[name] for x in found])) for name in found[0]},
      'finite': bool(all(x['finite'] for x in found)),
      'used': share,
    }

  def _pack(
    self, rollouts: batches.Rollouts, advantages_N: np.ndarray, **more: Any
  ) -> typing.Batch:
    return batches.pack(
      rollouts,
      advantages_N,
      sequence_length=self._config.sequence_length,
      aggregation=self._config.policy.resolved_aggregation,
      num_rows=self._num_parts * self._part_rows,
      max_completion_tokens=self._sampling.max_new_tokens,
      pad_id=self._pad_id,
      **more,
    )

  def _place(self, batch: typing.Batch) -> Any:
    """Rows that hold something come first in every part, not in the first."""
    parts, rows = self._num_parts, self._part_rows
    order = np.arange(parts * rows).reshape(parts, rows).T.reshape(-1)
    return self._put({name: x[order] for name, x in batch.items()})

  def _put(self, batch: typing.Batch) -> Any:
    """Every process packs the whole batch and puts its rows on its devices."""
    return {
      name: jax.make_array_from_callback(
        x.shape, self._batch_sharding, np.asarray(x).__getitem__
      )
      for name, x in batch.items()
    }

  def _log_probs_of(
    self,
    params: typing.Params | None,
    rollouts: batches.Rollouts,
    advantages_N: np.ndarray,
  ) -> np.ndarray:
    batch = self._pack(rollouts, advantages_N)
    found = []
    for part in range(self._num_parts):
      rows = slice(part * self._part_rows, (part + 1) * self._part_rows)
      some = {name: x[rows] for name, x in batch.items()}
      if not some['loss_weights'].any():
        found.append(np.zeros(some['tokens'].shape, np.float32))
        continue
      found.append(np.asarray(self._log_probs(params, self._put(some))))
    return batches.unpack(np.concatenate(found), rollouts)


def _skipped(state: state_lib.TrainState) -> state_lib.TrainState:
  """A step of the run without an update of the policy."""
  return state.replace(step=state.step + 1)
