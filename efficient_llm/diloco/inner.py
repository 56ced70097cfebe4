"""The inner step of all islands: the train step of plain training, mapped."""

import functools
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


def make(
  train_step: step.TrainStep,
  *,
  num_islands: int,
  shardings: DilocoState,
  batch_sharding: NamedSharding,
  may_rest: bool,
) -> InnerStep:
  """One program in which no value depends on two islands.

  Args:
    train_step: (state, batch) -> (state, metrics) of one island.
    num_islands: How many there are.
    shardings: Of the whole state.
    batch_sharding: Of a batch [M, B, T].
    may_rest: Whether an island whose batch has no weight stays as it is.
  """
  each = NamedSharding(batch_sharding.mesh, PartitionSpec('island'))
  if num_islands == 1:
    step_all = functools.partial(_alone, train_step)
  else:
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


def _alone(
  train_step: step.TrainStep, islands: train_state.TrainState, batch: Any
) -> tuple[Any, Any]:
  """The step of plain training, rounded as there.

  It stands in a loop of one turn, or else the compiler takes the axis into it
  and rounds some updates otherwise.
  """
  state, rows = jax.tree.map(lambda x: x[0], (islands, dict(batch)))
  _, shapes = jax.eval_shape(train_step, state, rows)
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  # A number of turns that the compiler cannot know.
  turns = 1 + jnp.minimum(state.step, 0)

  def turn(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
    return train_step(carry[0], rows)

  new = jax.lax.fori_loop(0, turns, turn, (state, nothing))
  return jax.tree.map(lambda x: x[None], new)
