"""The inner step of all islands: the train step of plain training, mapped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from efficient_llm import typing
from efficient_llm.diloco import outer
from efficient_llm.diloco.state import DilocoState
from efficient_llm.training import state as train_state
from efficient_llm.training import step

# (step, islands, tokens_PM, batch) -> (step, islands, tokens_PM, metrics), all
# but the batch donated, metrics by island.
InnerStep = Callable[..., tuple[Any, ...]]


def mapped(
  train_step: step.TrainStep,
  *,
  shardings: DilocoState,
  batch_sharding: NamedSharding,
  may_rest: bool,
) -> InnerStep:
  """One program in which no value depends on two islands.

  Args:
    train_step: (state, batch) -> (state, metrics) of one island.
    shardings: Of the whole state.
    batch_sharding: Of a batch [M, B, T].
    may_rest: Whether an island whose batch has no weight stays as it is.
  """
  each = NamedSharding(batch_sharding.mesh, PartitionSpec('island'))
  step_all = jax.vmap(train_step, spmd_axis_name='island')

  def inner_step(
    number: jax.Array,
    islands: train_state.TrainState,
    tokens_PM: jax.Array,
    batch: typing.Batch,
  ) -> tuple[Any, ...]:
    new, metrics = step_all(islands, batch)
    if may_rest:
      trains_M = batch['loss_weights'].sum((1, 2)) > 0
      new = jax.tree.map(
        lambda a_M, b_M: jnp.where(outer.wide(trains_M, a_M), a_M, b_M),
        new,
        islands,
      )
      metrics['trains'] = trains_M
    counted_M = jnp.where(metrics['finite'], metrics['tokens'], 0.0)
    return number + 1, new, tokens_PM + counted_M, metrics

  kept = (shardings.step, shardings.islands, shardings.tokens_PM)
  return jax.jit(
    inner_step,
    in_shardings=(*kept, batch_sharding),
    out_shardings=(*kept, each),
    donate_argnums=(0, 1, 2),
  )


def alone(
  train_step: step.TrainStep,
  *,
  shardings: DilocoState,
  batch_sharding: NamedSharding,
  may_rest: bool,
) -> InnerStep:
  """The program of plain training, and the island axis off and on around it.

  With the axis inside, the compiler rounds a few updates otherwise. The price
  is a second copy of the state for a moment.

  Args:
    train_step: As for `mapped`.
    shardings: As for `mapped`.
    batch_sharding: As for `mapped`.
    may_rest: As for `mapped`.
  """
  if may_rest:
    return mapped(
      train_step,
      shardings=shardings,
      batch_sharding=batch_sharding,
      may_rest=True,
    )

  def without(where: NamedSharding) -> NamedSharding:
    return NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))

  own = jax.tree.map(without, shardings.islands)
  rows = without(batch_sharding)
  off = jax.jit(
    lambda tree: jax.tree.map(lambda x: x[0], tree), out_shardings=(own, rows)
  )
  kept = (shardings.step, shardings.islands, shardings.tokens_PM)
  each = NamedSharding(batch_sharding.mesh, PartitionSpec('island'))
  plain = step.jit_train_step(train_step, own, rows)

  def on(number: Any, tokens_PM: Any, state: Any, metrics: Any) -> Any:
    islands, metrics = jax.tree.map(lambda x: x[None], (state, metrics))
    counted_M = jnp.where(metrics['finite'], metrics['tokens'], 0.0)
    return number + 1, islands, tokens_PM + counted_M, metrics

  jit_on = jax.jit(on, out_shardings=(*kept, each))

  def inner_step(
    number: jax.Array,
    islands: train_state.TrainState,
    tokens_PM: jax.Array,
    batch: typing.Batch,
  ) -> tuple[Any, ...]:
    state, row = off((islands, dict(batch)))
    jax.tree.map(lambda x: x.delete(), islands)
    return jit_on(number, tokens_PM, *plain(state, row))

  return inner_step
