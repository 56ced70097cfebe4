"""Tests of attention that is mapped by rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import cudnn_attention

_ISLANDS, _ROWS, _TOKENS, _HEADS, _KV_HEADS, _DIM = 3, 2, 8, 4, 2, 8


def _inputs() -> tuple[jax.Array, ...]:
  keys = jax.random.split(jax.random.key(0), 4)
  shape = (_ISLANDS, _ROWS, _TOKENS)
  q, k, v = (
    jax.random.normal(key, (*shape, heads, _DIM))
    for key, heads in zip(keys, (_HEADS, _KV_HEADS, _KV_HEADS), strict=False)
  )
  ids = jnp.sort(jax.random.randint(keys[3], shape, 1, 4))
  return q, k, v, ids[:, :, None, :, None] == ids[:, :, None, None, :]


def _attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
  return cudnn_attention.attend_mapped(q, k, v, mask, True, 'xla')


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('shared', [False, True])
def test_mapped_over_islands_it_is_what_each_computes(
  shared: bool, masked: bool
) -> None:
  q, k, v, mask = _inputs()
  mask = mask if masked else None
  # Keys that all islands share are not mapped.
  axes = (0, None if shared else 0, 0, 0 if masked else None)
  inputs = (q, k[0] if shared else k, v, mask)

  def loss(q, k, v, mask):
    y = _attend(q, k, v, mask)
    return (y**2).sum(), y

  def plain(q, k, v, mask):
    y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)
    return (y**2).sum(), y

  found, expected = (
    jax.vmap(jax.value_and_grad(f, (0, 1, 2), has_aux=True), axes)(*inputs)
    for f in (loss, plain)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected
  )


def test_no_value_depends_on_two_islands() -> None:
  q, k, v, mask = _inputs()

  def run(q):
    return jax.vmap(_attend)(q, k, v, mask)

  changed = run(q.at[0].add(1.0))
  np.testing.assert_array_equal(changed[1:], run(q)[1:])
  assert not np.allclose(changed[0], run(q)[0])


def test_it_may_stand_in_a_loop_and_be_computed_again() -> None:
  q, k, v, mask = _inputs()

  def loss(q, k, v, mask):
    @jax.checkpoint
    def layer(x, _):
      return _attend(x, k, v, mask), None

    return jax.lax.scan(layer, q, None, length=2)[0].sum()

  gradient = jax.jit(jax.vmap(jax.grad(loss), spmd_axis_name='island'))
  assert np.isfinite(gradient(q, k, v, mask)).all()
