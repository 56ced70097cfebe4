"""Tests of encoding outer gradients: bounds, sizes, what cannot be encoded."""

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm.diloco import compression
from efficient_llm.diloco.compression import CompressionConfig

_FORMATS: tuple[compression.Format, ...] = ('float16', 'int8', 'int4', 'e3m0')
# Scales are rounded up to bfloat16, by at most this factor.
_SCALE_SLACK = 1 + 2.0**-7

# Few shapes, as each is compiled: a scalar, odd sizes, several blocks.
arrays = st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 8)]).flatmap(
  lambda shape: hypothesis.extra.numpy.arrays(
    np.float32,
    shape,
    elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False),
  )
)


def _decoded(x: np.ndarray, **settings) -> np.ndarray:
  config = CompressionConfig(**settings)
  return np.asarray(compression.decode(compression.encode(x, config)))


def _block_maxima(x: np.ndarray, block_size: int) -> np.ndarray:
  """The largest magnitude of each value's block, found the slow way."""
  rows = x.reshape(-1, x.shape[-1])
  encoded = compression.encode(x, CompressionConfig('int8', block_size))
  maxima = np.zeros_like(rows)
  for start in range(0, rows.shape[1], encoded.block):
    part = slice(start, start + encoded.block)
    maxima[:, part] = np.abs(rows[:, part]).max(1, keepdims=True)
  return maxima.reshape(x.shape)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(arrays, st.sampled_from(_FORMATS), st.sampled_from([2, 4]))
def test_a_round_trip_stays_within_the_format_s_bound(
  x: np.ndarray, format: compression.Format, block_size: int
) -> None:
  decoded = _decoded(x, format=format, block_size=block_size)
  assert decoded.shape == x.shape
  largest = _block_maxima(np.atleast_1d(x), block_size).reshape(x.shape)
  largest = largest * _SCALE_SLACK
  # Half a step; e3m0's steps are as large as its values, 2/3 of the next one.
  bounds = {
    'float16': largest * 2.0**-12,
    'int8': largest / 254,
    'int4': largest / 14,
    'e3m0': np.maximum(np.abs(x) / 3, largest * 2.0**-7),
  }
  # Blocks this small count as zeros.
  bound = np.maximum(bounds[format] * (1 + 1e-5), 2e-36)
  assert (np.abs(decoded - x) <= bound).all()


@pytest.mark.parametrize('format', [*_FORMATS, 'float32'])
def test_zeros_come_back_as_zeros(format: compression.Format) -> None:
  x = np.zeros((3, 70), np.float32)
  np.testing.assert_array_equal(_decoded(x, format=format), x)


@pytest.mark.parametrize('format', _FORMATS)
@pytest.mark.parametrize('bad', [np.inf, -np.inf, np.nan])
def test_a_value_that_is_not_finite_spoils_its_block_alone(
  format: compression.Format, bad: float
) -> None:
  x = np.ones(8, np.float32)
  x[1] = bad
  decoded = _decoded(x, format=format, block_size=4)
  assert np.isnan(decoded[:4]).all()
  assert np.isfinite(decoded[4:]).all()


@pytest.mark.parametrize(
  ('format', 'expected'),
  [('float32', 4096), ('float16', 2080), ('int8', 1056), ('int4', 544),
   ('e3m0', 544)],
)  # fmt: skip
def test_arrays_have_the_size_that_is_sent(
  format: compression.Format, expected: int
) -> None:
  encoded = compression.encode(
    np.ones((2, 512), np.float32), CompressionConfig(format)
  )
  assert compression.num_bytes(encoded) == expected
  assert expected == sum(x.nbytes for x in jax.tree.leaves(encoded))


def test_e3m0_expresses_powers_of_two_exactly() -> None:
  x = np.array([0, 1, -0.5, 0.25, 2.0**-6, -(2.0**-4)], np.float32)
  np.testing.assert_array_equal(_decoded(x, format='e3m0'), x)


def test_only_the_largest_values_of_a_block_are_sent() -> None:
  x = np.array([1, -8, 2, 3, 0.5, 0.25, -0.75, 0.1], np.float32)
  config = CompressionConfig('float32', block_size=4, density=0.5)
  encoded = compression.encode(x, config)
  np.testing.assert_array_equal(
    compression.decode(encoded),
    np.array([0, -8, 0, 3, 0.5, 0, -0.75, 0], np.float32),
  )
  assert encoded.codes.shape == (2, 2)


@pytest.mark.parametrize('format', _FORMATS)
def test_error_feedback_sends_everything_in_the_end(
  format: compression.Format,
) -> None:
  delta = {'w': np.random.default_rng(0).normal(size=50).astype(np.float32)}
  config = CompressionConfig(format, density=0.25)
  residual = jax.tree.map(jnp.zeros_like, delta)
  total = np.zeros(50, np.float32)
  for _ in range(40):
    _, sent, residual = compression.compress(delta, residual, config)
    total += sent['w']
  np.testing.assert_allclose(
    total + residual['w'], 40 * delta['w'], atol=1e-4, rtol=1e-5
  )
  # What is still owed is a few rounds' worth, not a share of all of them.
  assert np.abs(residual['w']).max() < 12 * np.abs(delta['w']).max()


def test_what_is_not_finite_is_not_owed() -> None:
  delta = {'w': np.array([np.nan, 1, 2, 3], np.float32)}
  _, _, residual = compression.compress(
    delta, {'w': jnp.zeros(4)}, CompressionConfig('int4')
  )
  np.testing.assert_array_equal(residual['w'], np.zeros(4))


def test_encoding_is_the_same_alone_and_in_a_stack() -> None:
  x_M = np.random.default_rng(0).normal(size=(3, 5, 70)).astype(np.float32)
  config = CompressionConfig('int4')
  stacked = jax.jit(jax.vmap(lambda x: compression.encode(x, config)))(x_M)
  alone = compression.encode(x_M[1], config)
  jax.tree.map(
    np.testing.assert_array_equal, jax.tree.map(lambda x: x[1], stacked), alone
  )


@pytest.mark.parametrize(
  ('settings', 'expected'),
  [
    ({'format': 'int3'}, 'compression.format'),
    ({'block_size': 1}, 'compression.block_size=1 must'),
    ({'density': 0.0}, 'compression.density=0.0 must'),
    ({'error_decay': 1.5}, 'compression.error_decay=1.5 must'),
  ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings, expected) -> None:
  with pytest.raises(ValueError, match=expected):
    CompressionConfig(**settings).validate()
