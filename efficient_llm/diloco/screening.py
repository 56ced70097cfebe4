"""Bad islands: updates that are found out, refused and reported.

The order of checks is the order of the codes in `REASONS`. An island is judged
on what everybody would apply, the decoded update.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm import typing
from efficient_llm.diloco import outer

REASONS = (
  'accepted',
  'not finite',
  'replayed',
  'too large',
  'against the rest',
)

# Fewer cannot outvote a bad one.
_FEWEST_FOR_COSINE = 3
_WEISZFELD_STEPS = 16
# 2^32 over the golden ratio: neighbours are far apart.
_GOLDEN = np.uint32(2654435761)


@dataclasses.dataclass(frozen=True)
class ScreeningConfig:
  """Which updates are refused, and how the others are merged.

  Values that are not finite, and an island's own earlier updates sent again,
  are always refused.

  Attributes:
    norm_cap: Largest norm, as a multiple of the median; None for any.
    min_cosine: Smallest cosine with the others' mean direction; None for any.
      Needs three islands, and no mixing of fragments: what islands keep of
      their own sums to about nothing, so that good updates point apart.
    merge: 'trimmed_mean' leaves the `trim` largest and smallest out at each
      value, 'geometric_median' minimises the summed distance.
    trim: Islands left out on either side.
  """

  norm_cap: float | None = 10.0
  min_cosine: float | None = None
  merge: Literal['mean', 'trimmed_mean', 'geometric_median'] = 'mean'
  trim: int = 1

  def check(self, *, num_islands: int) -> None:
    """Raises ValueError if a setting breaks a rule, in one line."""
    typing.check_choices(self, name='screening')
    if self.norm_cap is not None and not self.norm_cap > 1:
      raise ValueError(
        f'screening.norm_cap={self.norm_cap} must be above 1; none is off.'
      )
    if self.min_cosine is not None and not -1 <= self.min_cosine < 1:
      raise ValueError(
        f'screening.min_cosine={self.min_cosine} must be in [-1, 1); none is '
        'off.'
      )
    if self.merge == 'trimmed_mean' and not 0 < 2 * self.trim < num_islands:
      raise ValueError(
        f'screening.trim={self.trim} must be at least 1 and leave some of '
        f'{num_islands} islands in the middle; change it or screening.merge.'
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verdict:
  """What was found of the islands' updates.

  Attributes:
    codes_M: Index into `REASONS`, int32; absent islands count as accepted.
    norms_M: Euclidean norms.
    cosines_M: With the sum of the others' directions; 0 where there is none.
    prints_M: Fingerprints, uint32.
  """

  codes_M: jax.Array
  norms_M: jax.Array
  cosines_M: jax.Array
  prints_M: jax.Array


def judge(
  deltas_M: typing.PyTree,
  weights_M: jax.Array,
  seen_MR: jax.Array,
  config: ScreeningConfig,
) -> Verdict:
  """Judges the updates of a round.

  Args:
    deltas_M: Decoded outer gradients, islands along the leading axis.
    weights_M: 0 where an island sent nothing.
    seen_MR: Fingerprints of its earlier updates, uint32; 0 for none.
    config: The rules.
  """
  is_there_M = weights_M > 0
  gram_MM, norms_M = _gram(deltas_M)
  is_finite_M = jnp.isfinite(norms_M)
  prints_M = fingerprints(deltas_M)
  # An update of nothing may well come twice.
  is_replay_M = (prints_M[:, None] == seen_MR).any(1) & (norms_M > 0)
  fine_M = is_there_M & is_finite_M & ~is_replay_M
  is_large_M = jnp.zeros_like(fine_M)
  if config.norm_cap is not None:
    median = jnp.nanmedian(jnp.where(fine_M, norms_M, jnp.nan))
    is_large_M = norms_M > config.norm_cap * median
  cosines_M = _cosines(gram_MM, norms_M, fine_M & ~is_large_M)
  is_against_M = jnp.zeros_like(fine_M)
  if config.min_cosine is not None:
    enough = jnp.sum(fine_M & ~is_large_M) >= _FEWEST_FOR_COSINE
    is_against_M = (cosines_M < config.min_cosine) & enough
  found = (~is_finite_M, is_replay_M, is_large_M, is_against_M)
  codes_M = jnp.zeros(is_there_M.shape, jnp.int32)
  for code, is_bad_M in reversed(list(enumerate(found, start=1))):
    codes_M = jnp.where(is_bad_M & is_there_M, code, codes_M)
  return Verdict(codes_M, norms_M, cosines_M, prints_M)


def fingerprints(deltas_M: typing.PyTree) -> jax.Array:
  """A number per island that changes with any bit of its update, uint32."""
  total_M = None
  for salt, x_M in enumerate(jax.tree.leaves(deltas_M)):
    bits_M = jax.lax.bitcast_convert_type(x_M, jnp.uint32)
    factors = (_places(x_M.shape[1:]) * _GOLDEN + np.uint32(salt)) * 2 + 1
    # Odd factors, so that every bit counts; mixed, so that places do.
    mixed_M = (bits_M ^ (bits_M >> 15)) * factors
    mixed_M ^= mixed_M >> 13
    sum_M = jnp.sum(mixed_M, range(1, x_M.ndim), dtype=jnp.uint32)
    total_M = sum_M if total_M is None else total_M * 31 + sum_M
  assert total_M is not None
  return jnp.maximum(total_M, 1)


def merger(config: ScreeningConfig) -> outer.Merge:
  """The function that makes one outer gradient of the accepted ones."""
  if config.merge == 'trimmed_mean':
    return functools.partial(trimmed_mean, trim=config.trim)
  if config.merge == 'geometric_median':
    return geometric_median
  return outer.weighted_mean


def trimmed_mean(
  values: typing.PyTree, weights_M: jax.Array, *, trim: int
) -> typing.PyTree:
  """Mean of each value without its largest and smallest over the islands.

  Args:
    values: Islands along the leading axis.
    weights_M: 0 leaves an island out beforehand.
    trim: How many are left out on either side; where so many are not there,
      the median or the two values beside it are taken.

  Source: Yin et al. 2018, arXiv:1803.01498. Differs: weighted.
  """
  is_there_M = weights_M > 0
  count = jnp.sum(is_there_M)
  cut = jnp.minimum(trim, (count - 1) // 2)

  def mean(x_M: jax.Array) -> jax.Array:
    wide = (-1, *(1,) * (x_M.ndim - 1))
    there_M = is_there_M.reshape(wide)
    ordered_M = jnp.where(there_M, x_M, jnp.inf)
    ranks_M = jnp.argsort(jnp.argsort(ordered_M, 0), 0)
    is_kept_M = there_M & (ranks_M >= cut) & (ranks_M < count - cut)
    kept_M = jnp.where(is_kept_M, weights_M.reshape(wide), 0.0)
    total = kept_M.sum(0)
    sums = jnp.where(is_kept_M, kept_M * x_M, 0.0).sum(0)
    return sums / jnp.where(total > 0, total, 1.0)

  return jax.tree.map(mean, values)


def geometric_median(
  values: typing.PyTree, weights_M: jax.Array
) -> typing.PyTree:
  """The point with the least weighted sum of distances to the islands'.

  Args:
    values: Islands along the leading axis; all of a tree is one point.
    weights_M: 0 leaves an island out.

  Source: Pillutla et al. 2022 (smoothed Weiszfeld), arXiv:1912.13445.
  """
  values = jax.tree.map(
    lambda x_M: jnp.where(outer.wide(weights_M > 0, x_M), x_M, 0.0),
    values,
  )
  _, norms_M = _gram(values)
  smallest = 1e-6 * jnp.max(norms_M) + 1e-30

  def step(point: typing.PyTree, _: None) -> tuple[typing.PyTree, None]:
    apart = jax.tree.map(lambda x_M, z: x_M - z, values, point)
    distances_M = jnp.maximum(_gram(apart)[1], smallest)
    return outer.weighted_mean(values, weights_M / distances_M), None

  start = outer.weighted_mean(values, weights_M)
  return jax.lax.scan(step, start, None, length=_WEISZFELD_STEPS)[0]


def _places(shape: tuple[int, ...]) -> jax.Array:
  """Counts the places of an array without reshaping what is sharded."""
  places, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    step = np.uint32(stride % (1 << 32))
    places += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * step
    stride *= shape[axis]
  return places


def _gram(tree_M: typing.PyTree) -> tuple[jax.Array, jax.Array]:
  """Products between the islands' trees, and their norms."""
  leaves = jax.tree.leaves(tree_M)
  count = leaves[0].shape[0]
  gram_MM = jnp.zeros((count, count))
  for x_M in leaves:
    # One row at a time, without reshaping what is sharded.
    rows = [jnp.sum(x_M[m] * x_M, range(1, x_M.ndim)) for m in range(count)]
    gram_MM += jnp.stack(rows)
  return gram_MM, jnp.sqrt(jnp.diagonal(gram_MM))


def _cosines(
  gram_MM: jax.Array, norms_M: jax.Array, among_M: jax.Array
) -> jax.Array:
  """Cosine of each with the sum of the other directions among some."""
  safe_M = jnp.where(among_M & (norms_M > 0), norms_M, 1.0)
  cosines_MM = gram_MM / (safe_M[:, None] * safe_M[None])
  pairs_MM = among_M[:, None] & among_M[None]
  cosines_MM = jnp.where(pairs_MM, cosines_MM, 0.0)
  others_MM = cosines_MM * (1 - jnp.eye(len(norms_M)))
  along_M = others_MM.sum(1)
  # |sum of the others|^2 = all products, less those with oneself.
  square_M = cosines_MM.sum() - 2 * cosines_MM.sum(1) + jnp.diagonal(cosines_MM)
  length_M = jnp.sqrt(jnp.maximum(square_M, 0.0))
  return jnp.where(
    length_M > 1e-6, along_M / jnp.where(length_M > 0, length_M, 1), 0.0
  )
