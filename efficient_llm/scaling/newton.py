"""Damped Newton steps within bounds, for many small problems at once.

Written for `jax.vmap`: matrices are solved by unrolled elimination, as a call
of LAPACK for each of thousands 5 by 5 systems costs more than all else.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm.typing import Array

_MOST_DAMPING = 1e16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Local:
  """A function near a point, to second order.

  Attributes:
    value: Of the function.
    gradient: [n].
    hessian: [n, n]; may have negative directions.
    scale: [n] positive curvatures that damping is measured in.
  """

  value: Array
  gradient: Array
  hessian: Array
  scale: Array


def minimize(
  local: Callable[[Array], Local],
  start: Array,
  *,
  lower: Array,
  upper: Array,
  max_steps: int | Array,
  tolerance: float = 1e-13,
  largest_ratio: float | None = None,
) -> tuple[Array, Array, Array]:
  """Minimises a smooth function of a few variables within bounds.

  A step solves (H + damping * scale) step = -g; it is taken where the function
  falls, and damping grows where it does not. Variables at a bound that the
  gradient pushes outwards rest for that step.

  Args:
    local: The function.
    start: [n], within the bounds.
    lower: [n].
    upper: [n].
    max_steps: Evaluations after the first.
    tolerance: Stops where a step gains less than this share of the value.
    largest_ratio: What a step may multiply or divide a variable by, all being
      above 0; None for no limit. A step as long as Newton's may land in another
      valley, on ground that is lower but leads nowhere.
  Returns:
    The point, its value, and how many steps were evaluated.
  """

  def go_on(carry) -> Array:
    _, _, damping, count, done = carry
    return (count < max_steps) & ~done & (damping < _MOST_DAMPING)

  def body(carry):
    point, here, damping, count, _ = carry
    step = _step(here, point, damping, lower, upper)
    trial = point + step
    if largest_ratio is not None:
      trial = jnp.clip(trial, point / largest_ratio, point * largest_ratio)
    trial = jnp.clip(trial, lower, upper)
    there = local(trial)
    gain = here.value - there.value
    better = gain >= 0  # false for NaN
    done = better & (gain <= tolerance * here.value) & (damping <= 1e-3)
    moved = jnp.any(trial != point) | (count == 0)
    point, here = jax.tree.map(
      lambda new, old: jnp.where(better, new, old),
      (trial, there),
      (point, here),
    )
    return (
      point,
      here,
      jnp.where(better, jnp.maximum(damping / 8, 1e-12), damping * 6),
      count + 1,
      done | ~moved,
    )

  # The first step goes nowhere, so that `local` is compiled once.
  n = start.shape[-1]
  nowhere = Local(jnp.array(jnp.inf), jnp.zeros(n), jnp.eye(n), jnp.ones(n))
  first = (start, nowhere, jnp.array(8e-3), jnp.array(0), jnp.array(False))
  point, here, _, count, _ = jax.lax.while_loop(go_on, body, first)
  return point, here.value, count


def _step(
  here: Local, point: Array, damping: Array, lower: Array, upper: Array
) -> Array:
  rests = ((point <= lower) & (here.gradient > 0)) | (
    (point >= upper) & (here.gradient < 0)
  )
  free = jnp.where(rests, 0.0, 1.0)
  scale = jnp.maximum(here.scale, 1e-30)
  matrix = here.hessian + jnp.diag(damping * scale)
  matrix = matrix * free[:, None] * free + jnp.diag((1 - free) * scale)
  return -solve_positive(matrix, here.gradient * free, scale)


def solve_positive(matrix: Array, right: Array, scale: Array) -> Array:
  """Solves by Cholesky's elimination; a pivot not above 0 is raised.

  A raised pivot turns a direction of negative curvature into one that goes
  down, as in modified Cholesky factorisations (Gill and Murray 1974).
  """
  n = right.shape[-1]
  # Unit scale, so that one threshold fits all variables.
  unit = 1 / jnp.sqrt(scale)
  rows: Array = matrix * unit[:, None] * unit
  factor: list[list[Any]] = [[None] * n for _ in range(n)]
  pivots: list[Array] = []
  for j in range(n):
    pivot: Any = rows[j, j]
    for k in range(j):
      pivot = pivot - factor[j][k] ** 2 * pivots[k]
    # Its size is kept: a saddle is left along its own curvature.
    pivots.append(jnp.maximum(jnp.abs(pivot), 1e-12))
    for i in range(j + 1, n):
      value = rows[i, j]
      for k in range(j):
        value = value - factor[i][k] * factor[j][k] * pivots[k]
      factor[i][j] = value / pivots[j]
  forward: list[Array] = []
  for i in range(n):
    value = right[i] * unit[i]
    for k in range(i):
      value = value - factor[i][k] * forward[k]
    forward.append(value)
  solution: list[Any] = [None] * n
  for i in reversed(range(n)):
    value = forward[i] / pivots[i]
    for k in range(i + 1, n):
      value = value - factor[k][i] * solution[k]
    solution[i] = value
  return jnp.stack([s * u for s, u in zip(solution, unit, strict=True)])
