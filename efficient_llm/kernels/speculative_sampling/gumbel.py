"""The Gumbel noise of `jax.random`, computed where it is used.

A kernel that makes its own noise reads the logits and nothing else; and with
the very bits of `jax.random` it draws the very tokens.

Source: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3
(Threefry-2x32, 20 rounds).
"""

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm.typing import Array

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.int32(0x1BD11BDA)
_MANTISSA_BITS = 23
_ONE = np.int32(0x3F800000)
_TINY = np.finfo(np.float32).tiny
_SETTINGS = {
  'jax_threefry_partitionable': True,
  'jax_high_dynamic_range_gumbel': False,
}


def bits(first_key: Array, second_key: Array, counts: Array) -> Array:
  """What `jax.random.bits` holds at `counts`, for arrays of one dimension.

  In int32 throughout, as its sums wrap and a logical shift ignores the sign.

  Args:
    first_key: The first word of the key data, as int32.
    second_key: The second.
    counts: Indices into the random array.
  """
  keys = (first_key, second_key, first_key ^ second_key ^ _PARITY)
  # The high word of a 64-bit count is 0 for arrays as long as a vocabulary.
  left = jnp.zeros_like(counts) + keys[0]
  right = counts + keys[1]
  for index in range(5):
    for rotation in _ROTATIONS[index % 2]:
      left = left + right
      right = (right << rotation) | jax.lax.shift_right_logical(
        right, jnp.full_like(right, 32 - rotation)
      )
      right = left ^ right
    left = left + keys[(index + 1) % 3]
    right = right + keys[(index + 2) % 3] + np.int32(index + 1)
  return left ^ right


def noise(first_key: Array, second_key: Array, counts: Array) -> Array:
  """What `jax.random.gumbel` holds at `counts`, in float32.

  Args:
    first_key: The first word of the key data, as int32.
    second_key: The second.
    counts: Indices into the random array.
  """
  random_bits = bits(first_key, second_key, counts)
  mantissa = jax.lax.shift_right_logical(
    random_bits, jnp.full_like(random_bits, 32 - _MANTISSA_BITS)
  )
  one_to_two = jax.lax.bitcast_convert_type(mantissa | _ONE, jnp.float32)
  uniform = jnp.maximum(one_to_two - 1.0, _TINY)
  return -jnp.log(-jnp.log(uniform))


def is_of_jax_random() -> bool:
  """Whether `jax.random` is set to draw what is computed here."""
  return all(getattr(jax.config, name) is on for name, on in _SETTINGS.items())
