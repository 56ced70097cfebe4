"""Optimisers and learning-rate schedules, all from optax."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from efficient_llm import typing


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW, Muon or SGD with a schedule and gradient clipping.

  Attributes:
    name: 'muon' orthogonalises the updates of inner matrices and leaves tables,
      output matrix, norms and biases to AdamW with Nesterov momentum (Jordan et
      al. 2024), and so the matrix of patches. 'sgd' has no momentum.
    learning_rate: Peak.
    schedule: 'wsd' is warm-up, stable, linear decay (Hu et al. 2024).
    warmup_steps: Linear from 0 to the peak.
    decay_fraction: Share of the steps over which 'wsd' decays, at most those
      after warm-up.
    final_fraction: Learning rate after the last step as a share of the peak.
    epsilon: Added to the root of the second moment.
    weight_decay: Times the learning rate, taken off matrices and tables; norms
      and biases do not decay.
    clip_norm: Global gradient norm is cut to this; None leaves it.
    muon_scale: Root mean square of Muon's update; 0.2 makes AdamW's learning
      rate and weight decay fit (Liu et al. 2025, arXiv:2502.16982).
  """

  name: Literal['adamw', 'muon', 'sgd'] = 'adamw'
  learning_rate: float = 1e-3
  schedule: Literal['cosine', 'wsd', 'constant'] = 'cosine'
  warmup_steps: int = 100
  decay_fraction: float = 0.2
  final_fraction: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float | None = 1.0
  muon_momentum: float = 0.95
  muon_scale: float = 0.2

  def validate(self) -> None:
    typing.check_choices(self, name='optimizer')
    for name in ('learning_rate', 'epsilon', 'muon_scale'):
      if not 0 < getattr(self, name) < float('inf'):
        raise ValueError(
          f'optimizer.{name}={getattr(self, name)} must be positive.'
        )
    for name in ('warmup_steps', 'weight_decay'):
      if not 0 <= getattr(self, name) < float('inf'):
        raise ValueError(
          f'optimizer.{name}={getattr(self, name)} must be 0 or more.'
        )
    for name in ('b1', 'b2', 'muon_momentum'):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(
          f'optimizer.{name}={getattr(self, name)} must be in [0, 1).'
        )
    for name in ('decay_fraction', 'final_fraction'):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(
          f'optimizer.{name}={getattr(self, name)} must be in [0, 1].'
        )
    if self.clip_norm is not None and not self.clip_norm > 0:
      raise ValueError(
        f'optimizer.clip_norm={self.clip_norm} must be positive; None is off.'
      )


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An optax transformation and the schedule inside it.

  Attributes:
    transform: What the train step applies.
    schedule: Learning rate by step, for the metrics.
  """

  transform: optax.GradientTransformation
  schedule: Callable[[Any], Any]


def make_schedule(
  config: OptimizerConfig, *, num_steps: int, name: str = 'optimizer'
) -> Callable[[Any], Any]:
  """Learning rate by step.

  Args:
    config: Settings.
    num_steps: Length of the schedule; behind it the last value holds.
    name: What the user calls the settings.
  Raises:
    ValueError: If warm-up leaves no step for the rest.
  """
  config.validate()
  warmup, peak = config.warmup_steps, config.learning_rate
  if warmup >= num_steps and config.schedule != 'constant':
    raise ValueError(
      f'{name}.warmup_steps={warmup} must be below {num_steps=}; lower it '
      'or train longer.'
    )
  final = peak * config.final_fraction
  if config.schedule == 'cosine':
    return optax.warmup_cosine_decay_schedule(
      init_value=0.0 if warmup else peak,
      peak_value=peak,
      warmup_steps=warmup,
      decay_steps=num_steps,
      end_value=final,
    )
  decay = min(int(num_steps * config.decay_fraction), num_steps - warmup)
  pieces = [optax.linear_schedule(0.0, peak, warmup), lambda _: peak]
  boundaries = [warmup]
  if config.schedule == 'wsd':
    pieces.append(optax.linear_schedule(peak, final, decay))
    boundaries.append(num_steps - decay)
  return optax.join_schedules(pieces, boundaries)


def make_optimizer(
  config: OptimizerConfig, axes: typing.PyTree, *, num_steps: int
) -> Optimizer:
  """Builds the optimiser for parameters with these named axes.

  Args:
    config: Settings.
    axes: Tree of LogicalAxes: weight decay takes matrices only, and Muon learns
      from it which axes are inputs and which outputs.
    num_steps: Length of the schedule.
  Raises:
    ValueError: If the configuration breaks a rule.
  """
  schedule = make_schedule(config, num_steps=num_steps)
  is_matrix = jax.tree.map(lambda leaf: leaf.is_matrix, axes)
  if config.name == 'adamw':
    update = optax.adamw(
      schedule,
      b1=config.b1,
      b2=config.b2,
      eps=config.epsilon,
      weight_decay=config.weight_decay,
      mask=is_matrix,
    )
  elif config.name == 'sgd':
    update = optax.chain(
      optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
      optax.sgd(schedule),
    )
  else:
    # Decay and schedule are applied outside: inside, `contrib.muon` would decay
    # norms and biases too. It already returns the descending direction.
    update = optax.chain(
      contrib.muon(
        1.0,
        beta=config.muon_momentum,
        eps=config.epsilon,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=muon_dimensions(axes),
        consistent_rms=config.muon_scale,
      ),
      optax.add_decayed_weights(-config.weight_decay, mask=is_matrix),
      optax.scale_by_schedule(schedule),
    )
  if config.clip_norm is not None:
    update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
  return Optimizer(transform=update, schedule=schedule)


def resting(optimizer: Optimizer, layers: Sequence[int]) -> Optimizer:
  """The optimiser that leaves some layers, and all outside layers, alone.

  Their gradients do not count in the norm that is clipped, and nothing decays.

  Args:
    optimizer: For parameters with stacked layers.
    layers: Those that rest; none lets everything train.
  """
  if not layers:
    return optimizer
  inner = optimizer.transform

  def only_others(tree: typing.PyTree) -> typing.PyTree:
    zeros = jax.tree.map(jnp.zeros_like, tree)
    rest = jnp.asarray(layers)
    trained = jax.tree.map(lambda x: x.at[rest].set(0), tree['layers'])
    return {**zeros, 'layers': trained}

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, state = inner.update(only_others(updates), state, params)
    return only_others(updates), state

  return dataclasses.replace(
    optimizer, transform=optax.GradientTransformation(inner.init, update)
  )


def muon_dimensions(axes: typing.PyTree) -> typing.PyTree:
  """Which axes Muon multiplies over; None leaves the parameter to AdamW.

  Args:
    axes: Tree of LogicalAxes.
  """

  def one(leaf: typing.LogicalAxes) -> contrib.MuonDimensionNumbers | None:
    looked_up = {'vocab', 'positions', 'token_types', 'pixels'}
    if not leaf.is_matrix or looked_up & set(leaf.names):
      return None
    first, second = len(leaf.stack), len(leaf.stack) + len(leaf.inputs)
    return contrib.MuonDimensionNumbers(
      reduction_axis=tuple(range(first, second)),
      output_axis=tuple(range(second, len(leaf.names))),
    )

  return jax.tree.map(one, axes)


def like_params(
  state: typing.PyTree, param_values: typing.PyTree, *, otherwise: Any
) -> typing.PyTree:
  """Replaces every moment in an optimiser state by its parameter's value.

  A moment is the leaf whose path ends with a parameter's path; this also holds
  for Muon's split state, which `optax.tree.map_params` refuses.

  Args:
    state: Optimiser state, or its shapes.
    param_values: One value per parameter (a sharding, named axes, ...).
    otherwise: What all other leaves (step counters) get.
  """
  by_path = {
    tuple(path): value
    for path, value in jax.tree_util.tree_leaves_with_path(param_values)
  }

  def one(path: tuple[Any, ...], _: Any) -> Any:
    ends = (path[start:] for start in range(len(path)))
    return next((by_path[end] for end in ends if end in by_path), otherwise)

  return jax.tree_util.tree_map_with_path(one, state)


def global_norm(tree: typing.PyTree) -> typing.Scalar:
  """Square root of the sum of squares of all leaves."""
  return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
