"""The projection and its own gradient rule against JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import projection

# (shape of x, shape of the kernel, how many axes are summed over)
_CASES = (
  ((3, 5, 4), (4, 6), 1),
  ((3, 5, 4), (4, 2, 6), 1),
  ((3, 5, 2, 4), (2, 4, 6), 2),
  ((7, 4), (4, 6), 1),
)


def _arrays(x_shape, kernel_shape, num_inputs):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], x_shape)
  kernel = jax.random.normal(keys[1], kernel_shape)
  y_shape = (*x_shape[:-num_inputs], *kernel_shape[num_inputs:])
  return x, kernel, jax.random.normal(keys[2], y_shape)


@pytest.mark.parametrize('case', _CASES)
def test_value_and_gradients_are_those_of_tensordot(case):
  x, kernel, weights = _arrays(*case)

  def loss(product, x, kernel):
    return jnp.sum(product(x, kernel) * weights)

  def ours(x, kernel):
    return projection.project(x, kernel, case[2])

  def theirs(x, kernel):
    return jnp.tensordot(x, kernel, axes=case[2])

  np.testing.assert_array_equal(ours(x, kernel), theirs(x, kernel))
  for found, wanted in zip(
    jax.grad(loss, (1, 2))(ours, x, kernel),
    jax.grad(loss, (1, 2))(theirs, x, kernel),
    strict=True,
  ):
    # Sums of up to 15 products in another order: a few float32 roundings.
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_kernels_stacked_along_a_mapped_axis_have_their_own_gradients():
  x, kernel, weights = _arrays(*_CASES[1])

  def gradient(kernel):
    return jax.grad(
      lambda k: jnp.sum(projection.project(x, k, 1) ** 2 * weights)
    )(kernel)

  kernels = jnp.stack([kernel, 2 * kernel])
  mapped = jax.vmap(gradient)(kernels)
  for found, one in zip(mapped, kernels, strict=True):
    np.testing.assert_allclose(found, gradient(one), rtol=1e-5, atol=1e-5)


def test_gradients_keep_the_dtype_of_half_precision():
  x, kernel, _ = _arrays(*_CASES[0])
  half = kernel.astype(jnp.bfloat16)
  gradient = jax.grad(
    lambda k: projection.project(x.astype(jnp.bfloat16), k, 1).sum()
  )(half)
  assert gradient.dtype == jnp.bfloat16
