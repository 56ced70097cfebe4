"""Outer gradients in fewer bytes, each value quantised once.

Blocks of the last axis share a scale. What is sent is the `Encoded` tree; hub
and islands all apply `decode` of it, so they apply the same bits. What a format
cannot express is kept by the sender and added to its next outer gradient (error
feedback).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm import typing

Format = Literal['float32', 'float16', 'int8', 'int4', 'e3m0']

# The largest code of a format, to which the largest value of a block maps.
_LARGEST_CODE = {'float16': 1.0, 'int8': 127.0, 'int4': 7.0, 'e3m0': 1.0}
_NIBBLES = ('int4', 'e3m0')
# Halfway between neighbouring magnitudes 0, 2^-6, 2^-5, ..., 1.
_E3M0_BOUNDS = (2.0**-7, *(0.75 * 2.0**i for i in range(-5, 1)))
_SMALLEST_SCALE = 2.0**-126


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
  """How outer gradients are made small.

  Attributes:
    format: 'float32' sends them as they are; 'e3m0' is sign and exponent (4
      bits, Douillard et al. 2025); the others are usual.
    block_size: Values that share a scale, or are chosen from by `density`.
    density: Share of a block's values that is sent, the largest ones; None for
      all.
    error_feedback: Whether what was not sent is added to what is sent next.
    error_decay: Share of it that is.
  """

  format: Format = 'float32'
  block_size: int = 64
  density: float | None = None
  error_feedback: bool = True
  error_decay: float = 1.0

  @property
  def is_exact(self) -> bool:
    """Whether what is decoded is what was encoded."""
    return self.format == 'float32' and self.density is None

  @property
  def has_residual(self) -> bool:
    """Whether senders keep what they could not send."""
    return self.error_feedback and not self.is_exact

  def validate(self) -> None:
    typing.check_choices(self, name='compression')
    if not 2 <= self.block_size <= 1 << 16:
      raise ValueError(
        f'compression.block_size={self.block_size} must be in [2, 65536]; '
        'set 64.'
      )
    if self.density is not None and not 0 < self.density <= 1:
      raise ValueError(
        f'compression.density={self.density} must be in (0, 1]; none sends all.'
      )
    if not 0 <= self.error_decay <= 1:
      raise ValueError(
        f'compression.error_decay={self.error_decay} must be in [0, 1]; set 1.'
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
  """One array as it is sent.

  Attributes:
    codes: [..., blocks, bytes]; two values a byte where a code has four bits.
    scales: [..., blocks] bfloat16; None in float32.
    indices: [..., blocks, kept] uint16, places in the block; None for all.
    shape: Of the array.
    format: Of the codes.
    block: Values of a block, padding included.
  """

  codes: jax.Array
  scales: jax.Array | None
  indices: jax.Array | None
  shape: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  format: Format = dataclasses.field(metadata={'static': True})
  block: int = dataclasses.field(metadata={'static': True})


def encode(x: jax.Array | np.ndarray, config: CompressionConfig) -> Encoded:
  """Encodes an array.

  A block with a value that is not finite decodes to not-a-number throughout; a
  block whose largest value is below about 1e-36 decodes to zeros.

  Args:
    x: Of any shape.
    config: The format.
  """
  shape = x.shape
  x = jnp.asarray(x, jnp.float32).reshape(shape or (1,))
  block = _block_size(x.shape[-1], config.block_size)
  padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]
  x = jnp.pad(x, padding).reshape(*x.shape[:-1], -1, block)
  indices = None
  if config.density is not None:
    kept = max(1, round(config.density * block))
    indices = jax.lax.top_k(jnp.abs(x), kept)[1]
    x = jnp.take_along_axis(x, indices, -1)
    indices = indices.astype(jnp.uint16)
  if config.format == 'float32':
    return Encoded(x, None, indices, shape, config.format, block)
  scales = _scales(x, _LARGEST_CODE[config.format])
  wide = scales.astype(jnp.float32)[..., None]
  ratios = jnp.where(wide > 0, x / jnp.where(wide > 0, wide, 1.0), 0.0)
  codes = _to_codes(ratios, config.format)
  return Encoded(codes, scales, indices, shape, config.format, block)


def decode(encoded: Encoded) -> jax.Array:
  """The float32 array that everybody applies."""
  values = encoded.codes
  if encoded.scales is not None:
    kept = encoded.block
    if encoded.indices is not None:
      kept = encoded.indices.shape[-1]
    values = _from_codes(values, encoded.format, kept)
    values *= encoded.scales.astype(jnp.float32)[..., None]
  if encoded.indices is not None:
    values = jnp.put_along_axis(
      jnp.zeros((*values.shape[:-1], encoded.block)),
      encoded.indices.astype(jnp.int32),
      values,
      axis=-1,
      inplace=False,
    )
  shape = encoded.shape or (1,)
  values = values.reshape(*shape[:-1], -1)[..., : shape[-1]]
  return values.reshape(encoded.shape)


def compress(
  delta: typing.PyTree,
  residual: typing.PyTree | None,
  config: CompressionConfig,
) -> tuple[typing.PyTree, typing.PyTree, typing.PyTree]:
  """Encodes an island's outer gradient together with what it owes.

  Args:
    delta: Tree of arrays.
    residual: What was not sent before; None without error feedback.
    config: The format.

  Returns:
    Tree of `Encoded`, its decoded values, and the new residual, which is None
    without error feedback and 0 where the outer gradient is not finite.

  Source: error feedback after Seide et al. 2014, and Karimireddy et al. 2019,
  arXiv:1901.09847.
  """
  if residual is not None:
    delta = jax.tree.map(
      lambda x, owed: x + config.error_decay * owed, delta, residual
    )
  encoded = jax.tree.map(lambda x: encode(x, config), delta)
  decoded = decode_tree(encoded)
  if residual is not None:

    def rest(x: jax.Array, sent: jax.Array) -> jax.Array:
      return jnp.where(jnp.isfinite(x - sent), x - sent, 0.0)

    residual = jax.tree.map(rest, delta, decoded)
  return encoded, decoded, residual


def decode_tree(encoded: typing.PyTree) -> typing.PyTree:
  """Decodes every leaf of a tree of `Encoded`."""
  return jax.tree.map(
    decode, encoded, is_leaf=lambda leaf: isinstance(leaf, Encoded)
  )


def num_bytes(encoded: Any) -> int:
  """Bytes of all arrays in a tree of `Encoded`, or of its shapes."""
  return sum(
    leaf.size * jnp.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(encoded)
  )


def _block_size(size: int, largest: int) -> int:
  """An even size whose blocks waste the least padding."""
  num_blocks = -(-size // largest)
  block = -(-size // max(num_blocks, 1))
  return max(2, block + block % 2)


def _scales(x: jax.Array, largest_code: float) -> jax.Array:
  """Scales of blocks, rounded up so that no value exceeds the largest code."""
  largest = jnp.max(jnp.abs(x), -1) / largest_code
  bits = jax.lax.bitcast_convert_type(largest, jnp.uint32)
  upper = ((bits + 0xFFFF) >> 16).astype(jnp.uint16)
  scales = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
  scales = jnp.where(largest < _SMALLEST_SCALE, jnp.bfloat16(0), scales)
  return jnp.where(jnp.isfinite(largest), scales, jnp.bfloat16(jnp.nan))


def _to_codes(ratios: jax.Array, format: Format) -> jax.Array:
  if format == 'float16':
    return ratios.astype(jnp.float16)
  largest = _LARGEST_CODE[format]
  ratios = jnp.clip(ratios, -largest, largest)
  if format == 'int8':
    return jnp.round(ratios).astype(jnp.int8)
  if format == 'int4':
    nibbles = (jnp.round(ratios) + 8).astype(jnp.uint8)
  else:
    # Bound by bound, as an axis of bounds would be stored on a TPU.
    nibbles = 8 * (ratios < 0).astype(jnp.uint8)
    for bound in _E3M0_BOUNDS:
      nibbles += (jnp.abs(ratios) >= bound).astype(jnp.uint8)
  if nibbles.shape[-1] % 2:
    padding = [(0, 0)] * (nibbles.ndim - 1) + [(0, 1)]
    nibbles = jnp.pad(nibbles, padding)
  return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def _from_codes(codes: jax.Array, format: Format, count: int) -> jax.Array:
  """Multiples of the scale, the first `count` of each block."""
  if format not in _NIBBLES:
    return codes.astype(jnp.float32)
  nibbles = jnp.stack([codes & 15, codes >> 4], -1)
  nibbles = nibbles.reshape(*codes.shape[:-1], -1)[..., :count]
  if format == 'int4':
    return nibbles.astype(jnp.float32) - 8.0
  exponents = (nibbles & 7).astype(jnp.int32)
  # Powers of two by their bits, 2^-6 for code 1; a table would be gathered.
  sizes = jax.lax.bitcast_convert_type((exponents + 120) << 23, jnp.float32)
  sizes = jnp.where(exponents > 0, sizes, 0.0)
  return jnp.where(nibbles >= 8, -sizes, sizes)
