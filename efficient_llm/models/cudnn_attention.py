"""cuDNN's attention, and where a whole model is mapped, as over islands.

JAX's own rule for mapping wants a mask for each head, which is N times the
memory, and ends in an error where all heads share one (jax 0.10 to 0.12). Here
what is mapped becomes rows of the batch, at the price of computing attention
once more in the backward pass.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Implementation = Literal['xla', 'cudnn']
_Arrays = tuple[jax.Array | None, ...]


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask_B1TS: jax.Array | None,
  causal: bool,
  implementation: Implementation = 'cudnn',
) -> jax.Array:
  """Scaled dot-product attention.

  Args:
    q_BTNH: Queries; N is a multiple of K.
    k_BSKH: Keys.
    v_BSKH: Values.
    mask_B1TS: Who may attend to whom, but for causality; None for all.
    causal: Whether a token sees only its past.
    implementation: Of `jax.nn.dot_product_attention`.
  """
  return jax.nn.dot_product_attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    mask=mask_B1TS,
    is_causal=causal,
    implementation=implementation,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_mapped(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask_B1TS: jax.Array | None,
  causal: bool,
  implementation: Implementation = 'cudnn',
) -> jax.Array:
  """The same, which may be mapped."""

  def one(q: Any, k: Any, v: Any, mask: Any) -> jax.Array:
    return attend(q, k, v, mask, causal, implementation)

  return _by_rows(one)(q_BTNH, k_BSKH, v_BSKH, mask_B1TS)


def _forward(*arguments: Any) -> tuple[jax.Array, _Arrays]:
  return attend_mapped(*arguments), arguments[:4]


def _backward(
  causal: bool,
  implementation: Implementation,
  arrays: _Arrays,
  gradient_BTNH: jax.Array,
) -> tuple[jax.Array | None, ...]:
  def gradients(q: Any, k: Any, v: Any, mask: Any, gradient: Any) -> Any:
    def one(q: Any, k: Any, v: Any) -> jax.Array:
      return attend(q, k, v, mask, causal, implementation)

    return jax.vjp(one, q, k, v)[1](gradient)

  return *_by_rows(gradients)(*arrays, gradient_BTNH), None


attend_mapped.defvjp(_forward, _backward)


def _by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
  """The same function, mapped by making what is mapped rows of the batch."""
  mapped = jax.custom_batching.custom_vmap(function)

  @mapped.def_vmap
  def rule(
    axis_size: int, is_mapped: list[bool], *arrays: jax.Array | None
  ) -> tuple[Any, Any]:
    rows = []
    for array, has_axis in zip(arrays, is_mapped, strict=True):
      if array is not None:
        if not has_axis:
          array = jnp.broadcast_to(array, (axis_size, *array.shape))
        array = array.reshape(-1, *array.shape[2:])
      rows.append(array)
    results = jax.tree.map(
      lambda x: x.reshape(axis_size, -1, *x.shape[1:]), mapped(*rows)
    )
    return results, jax.tree.map(lambda _: True, results)

  return mapped
