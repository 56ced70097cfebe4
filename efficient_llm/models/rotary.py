"""Rotary positions, and what stretches them to longer texts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Scaling:
  """How Llama 3.1 stretches the wavelengths, which reads longer texts so.

  Waves of which the original texts held fewer than `low_factor` become `factor`
  times as long, those of which they held more than `high_factor` stay, and
  frequencies between are mixed from both.

  Attributes:
    factor: How much longer.
    low_factor: Waves in the original texts, up to which all of it applies.
    high_factor: From which on nothing does.
    original_positions: Tokens of those texts.
  Source: Llama team 2024, arXiv:2407.21783, section 3.4.3; as 'llama3' in
  transformers' modeling_rope_utils.
  """

  factor: float
  low_factor: float
  high_factor: float
  original_positions: int

  def stretch(self, rates_H: np.ndarray) -> np.ndarray:
    """Frequencies of the longer waves.

    Args:
      rates_H: Radians per position.
    """
    waves_H = self.original_positions * rates_H / (2 * math.pi)
    share_H = (waves_H - self.low_factor) / (self.high_factor - self.low_factor)
    share_H = np.clip(share_H, 0.0, 1.0)
    return (1 - share_H) * rates_H / self.factor + share_H * rates_H


def tables(
  positions_BT: jax.Array,
  *,
  head_dim: int,
  base: float,
  scaling: Scaling | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines [B, T, 1, H/2] of the rotary angles, float32.

  Args:
    positions_BT: Position of each token.
    head_dim: Even size of a head.
    base: Of the geometric series of wavelengths.
    scaling: Stretches them.
  Source: Su et al. 2021, RoFormer, equation 34, arXiv:2104.09864. Differs: the
  two halves of a head are the pairs, as in Llama.
  """
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  rates_H = base**-exponents
  if scaling is not None:
    exact_H = float(base) ** (-np.arange(0, head_dim, 2) / head_dim)
    rates_H = jnp.asarray(scaling.stretch(exact_H), jnp.float32)
  angles = positions_BT[..., None].astype(jnp.float32) * rates_H
  return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Applies rotary positions to queries or keys.

  Args:
    x_BTNH: Queries or keys.
    tables: From the function of that name.
  """
  cos, sin = tables
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, -1).astype(x_BTNH.dtype)
