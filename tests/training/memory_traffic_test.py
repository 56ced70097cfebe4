"""Tests of counting memory traffic, on programs compiled here."""

from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm.training import hlo, memory_traffic


def _count(function: Any, *arguments: Any) -> int:
  text = jax.jit(function).lower(*arguments).compile().as_text()
  assert text is not None
  return memory_traffic.count(hlo.parse(text))


def test_an_elementwise_kernel_reads_and_writes_once() -> None:
  x = jnp.ones(1024)
  assert _count(lambda x: jnp.sin(x) * 2, x) == 2 * x.nbytes


def test_a_product_reads_both_operands() -> None:
  a, b = jnp.ones((64, 128)), jnp.ones((128, 32))
  assert _count(jnp.dot, a, b) == a.nbytes + b.nbytes + 64 * 32 * 4


def test_a_scanned_stack_is_read_slice_by_slice() -> None:
  def apply(weights: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

  def count(num_layers: int) -> int:
    return _count(apply, jnp.ones((num_layers, 64, 64)), jnp.ones((4, 64)))

  # Whole stacks at every layer would make it grow with the square.
  assert 1.8 < (count(64) - count(16)) / (count(40) - count(16)) < 2.2
