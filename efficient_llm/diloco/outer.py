"""The outer step: islands' updates in, new shared parameters out.

Pure, and the same for every engine: islands may lie along a leading axis of
every array, or come as a list of trees, one per island. An outer gradient is
what the shared parameters were minus what an island made of them, so it points
the way a gradient does, and the outer optimiser subtracts it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efficient_llm import typing

# (outer gradients with a leading axis, weights) -> one outer gradient.
Merge = Callable[[typing.PyTree, jax.Array], typing.PyTree]

# Best rates at 335 M parameters and more, sync period 30, outer momentum 0.9:
# the rate depends on the number of islands, not on the size of the model.
_RECOMMENDED_RATES = {1: 0.4, 2: 0.6, 4: 0.6, 8: 0.8}


@dataclasses.dataclass(frozen=True)
class OuterConfig:
  """What the shared parameters are updated with.

  Attributes:
    optimizer: 'nesterov' as in DiLoCo; 'sgd' with rate 1 is averaging (local
      SGD, FedAvg); 'adam' needs a large epsilon; 'delayed_nesterov' is for
      updates that arrive one by one.
    learning_rate: Constant; None for the one recommended for the number of
      islands.
    momentum: Of 'nesterov' and 'delayed_nesterov'; first moment of 'adam'.
    second_moment: Of 'adam'.
    epsilon: Of 'adam'.
    delay: Updates between two of the momentum in 'delayed_nesterov'; None for
      the number of islands.
  """

  optimizer: Literal['nesterov', 'sgd', 'adam', 'delayed_nesterov'] = 'nesterov'
  learning_rate: float | None = 0.7
  momentum: float = 0.9
  second_moment: float = 0.95
  epsilon: float = 0.1
  delay: int | None = None

  def validate(self) -> None:
    typing.check_choices(self, name='outer')
    rate = self.learning_rate
    if rate is not None and not 0 < rate < float('inf'):
      raise ValueError(
        f'outer.learning_rate={rate} must be positive; none takes the '
        'recommended one.'
      )
    for name in ('momentum', 'second_moment'):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(
          f'outer.{name}={getattr(self, name)} must be in [0, 1).'
        )
    if not self.epsilon > 0:
      raise ValueError(f'outer.epsilon={self.epsilon} must be positive.')
    if self.delay is not None and self.delay < 1:
      raise ValueError(f'outer.delay={self.delay} must be at least 1.')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OuterState:
  """What all islands share, or one of their fragments.

  Attributes:
    params: Float32.
    opt_state: Of the outer optimiser.
    version: Outer steps done, int32.
  """

  params: typing.PyTree
  opt_state: typing.PyTree
  version: jax.Array


def recommended_rate(num_islands: int) -> float:
  """Outer learning rate for a number of islands.

  Args:
    num_islands: Between the published 1, 2, 4, 8 the nearest below is taken.

  Source: Charles et al. 2025, arXiv:2503.09799.
  """
  return _RECOMMENDED_RATES[
    max(islands for islands in _RECOMMENDED_RATES if islands <= num_islands)
  ]


def make_optimizer(
  config: OuterConfig, *, num_islands: int
) -> optax.GradientTransformation:
  """The outer optimiser.

  Args:
    config: Settings.
    num_islands: How many there are.
  Raises:
    ValueError: If the configuration breaks a rule.
  """
  config.validate()
  rate = config.learning_rate
  if rate is None:
    rate = recommended_rate(num_islands)
  if config.optimizer == 'sgd':
    return optax.sgd(rate)
  if config.optimizer == 'nesterov':
    return optax.sgd(rate, momentum=config.momentum, nesterov=True)
  if config.optimizer == 'delayed_nesterov':
    delay = num_islands if config.delay is None else config.delay
    return delayed_nesterov(rate, momentum=config.momentum, delay=delay)
  return optax.adam(
    rate, b1=config.momentum, b2=config.second_moment, eps=config.epsilon
  )


class DelayedNesterovState(NamedTuple):
  """State of `delayed_nesterov`.

  Attributes:
    count: Updates so far.
    momentum: As of the last time it changed.
    pending: Sum of the updates since.
  """

  count: jax.Array
  momentum: typing.PyTree
  pending: typing.PyTree


def delayed_nesterov(
  learning_rate: float, *, momentum: float, delay: int
) -> optax.GradientTransformation:
  """Momentum for updates that arrive one by one, some of them stale.

  Each is applied at once, a `delay`-th part of it; the momentum takes them in
  and moves the parameters only every `delay` updates:

    m <- beta m + D / N,   Theta <- Theta - eta (beta m + g / N)

  where D sums the last N updates; in between, Theta <- Theta - eta g / N.

  Args:
    learning_rate: eta.
    momentum: beta.
    delay: N.

  Source: Liu et al. 2024 with c = 0, arXiv:2401.09135.
  """

  def init(params: typing.PyTree) -> DelayedNesterovState:
    # Twice, as buffers that are one cannot both be donated.
    first, second = (jax.tree.map(jnp.zeros_like, params) for _ in '12')
    return DelayedNesterovState(jnp.int32(0), first, second)

  def update(
    updates: Any, state: Any, params: Any = None
  ) -> tuple[Any, DelayedNesterovState]:
    del params
    grads = updates
    is_full = (state.count + 1) % delay == 0
    pending = jax.tree.map(jnp.add, state.pending, grads)
    moved = jax.tree.map(
      lambda m, d: jnp.where(is_full, momentum * m + d / delay, m),
      state.momentum,
      pending,
    )
    moves = jax.tree.map(
      lambda m, g: (
        -learning_rate * (jnp.where(is_full, momentum * m, 0.0) + g / delay)
      ),
      moved,
      grads,
    )
    pending = jax.tree.map(lambda d: jnp.where(is_full, 0.0, d), pending)
    return moves, DelayedNesterovState(state.count + 1, moved, pending)

  return optax.GradientTransformation(init, update)


def init(
  params: typing.PyTree, optimizer: optax.GradientTransformation
) -> OuterState:
  """State before the first outer step."""
  return OuterState(params, optimizer.init(params), jnp.int32(0))


def outer_step(
  state: OuterState,
  deltas: typing.PyTree | Sequence[typing.PyTree],
  weights: Any,
  *,
  optimizer: optax.GradientTransformation,
  merge: Merge | None = None,
  averaged: typing.PyTree | None = None,
) -> OuterState:
  """Merges the islands' outer gradients and applies one outer update.

  Where all weights are 0 nothing changes but rounding: not even the version.

  Args:
    state: What is shared.
    deltas: Outer gradients: a tree with a leading axis [M], or a list of trees.
    weights: One per island, such as its tokens; 0 leaves an island out, and
      then its values may be anything.
    optimizer: From `make_optimizer`.
    merge: Makes one outer gradient of many; `weighted_mean` by default.
    averaged: The mean of the islands' parameters where it is known: it spares
      the rounding of their difference, so that rate 1 without momentum is
      averaging to the last bit.

  Returns:
    The new state.
  """
  deltas_M, weights_M = stacked(deltas), jnp.asarray(weights, jnp.float32)
  gradient = (merge or weighted_mean)(deltas_M, weights_M)
  new = apply_gradient(state, gradient, optimizer=optimizer, averaged=averaged)
  has_any = jnp.any(weights_M > 0)
  return jax.tree.map(lambda a, b: jnp.where(has_any, a, b), new, state)


def apply_gradient(
  state: OuterState,
  gradient: typing.PyTree,
  *,
  optimizer: optax.GradientTransformation,
  averaged: typing.PyTree | None = None,
) -> OuterState:
  """One update with an outer gradient that is merged already."""
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  if averaged is None:
    params = optax.apply_updates(state.params, updates)
  else:
    params = jax.tree.map(
      lambda mean, update, g: mean + (update + g), averaged, updates, gradient
    )
  return OuterState(params, opt_state, state.version + 1)


def stacked(trees: typing.PyTree | Sequence[typing.PyTree]) -> typing.PyTree:
  """One tree with a leading island axis of a list of trees."""
  if isinstance(trees, (list, tuple)):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
  return trees


def wide(x_M: jax.Array, like_M: jax.Array) -> jax.Array:
  """One value per island, broadcast against stacked arrays."""
  return x_M.reshape(-1, *(1,) * (like_M.ndim - 1))


def weighted_mean(values: typing.PyTree, weights_M: jax.Array) -> typing.PyTree:
  """Mean over the leading axis; what has no weight may be anything.

  Islands are added in their order, so that all machines get the same bits.
  """
  total = jnp.sum(weights_M)
  shares_M = weights_M / jnp.where(total > 0, total, 1.0)

  def mean(x_M: jax.Array) -> jax.Array:
    terms = [
      jnp.where(shares_M[m] > 0, shares_M[m] * x_M[m], 0.0)
      for m in range(x_M.shape[0])
    ]
    return sum(terms[1:], terms[0])

  return jax.tree.map(mean, values)


def mean_where_sent(
  values: typing.PyTree, weights_M: jax.Array
) -> typing.PyTree:
  """Mean of each value over the islands that sent it, which is not 0 there.

  For outer gradients of which only the largest values were sent.

  Source: Sarfi et al. 2025 (SparseLoCo), arXiv:2508.15706.
  """

  def mean(x_M: jax.Array) -> jax.Array:
    total = jnp.zeros(x_M.shape[1:])
    weight = jnp.zeros(x_M.shape[1:])
    for m in range(x_M.shape[0]):
      is_sent = (x_M[m] != 0) & (weights_M[m] > 0)
      total += jnp.where(is_sent, weights_M[m] * x_M[m], 0.0)
      weight += jnp.where(is_sent, weights_M[m], 0.0)
    return total / jnp.where(weight > 0, weight, 1.0)

  return jax.tree.map(mean, values)
