"""Attention of a few new tokens to a cache: the tree kernel, or XLA."""

from typing import cast

import jax
import jax.numpy as jnp

from efficient_llm import sharding
from efficient_llm.kernels import selection

# Finite, so that a query that sees nothing gives no NaN.
_FORBIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def tree_attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  cache_lengths_B: jax.Array,
  tail_BTT: jax.Array | None,
  *,
  implementation: str,
) -> jax.Array | None:
  """The kernel for a few tokens; None where XLA serves.

  Args:
    q_BTNH: Queries.
    k_BSKH: Keys of the cache, the new tokens' written.
    v_BSKH: Values likewise.
    cache_lengths_B: Tokens before the new ones.
    tail_BTT: Which new tokens see each other; causal where None.
    implementation: As configured; 'auto' goes by device and shapes.
  """
  device = jax.devices()[0]
  here = selection.kernel_for(device.platform, device.device_kind)
  asked = implementation in ('pallas_tpu', 'pallas_gpu')
  if not asked and (implementation != 'auto' or here == 'xla'):
    return None
  from efficient_llm.kernels.tree_attention import api

  num_tokens = q_BTNH.shape[1]
  keys_BKSH, values_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
  if num_tokens > api.MAX_TREE_TOKENS:
    return None
  kernel = cast(selection.Implementation, implementation if asked else here)
  if not asked:
    kernel = api.choose(
      q_BTNH,
      keys_BKSH,
      platform=device.platform,
      device_kind=device.device_kind,
    ).implementation
  if kernel == 'xla':
    return None
  if tail_BTT is None:
    tail_BTT = jnp.broadcast_to(
      jnp.tri(num_tokens, dtype=bool), (len(q_BTNH), num_tokens, num_tokens)
    )
  mesh, spec = jax.sharding.get_abstract_mesh(), None
  if not mesh.empty and mesh.size > 1:
    spec = sharding.divisible_spec(
      keys_BKSH.shape, ('batch', 'kv_heads', None, None), mesh
    )
  return api.attend(
    q_BTNH,
    keys_BKSH,
    values_BKSH,
    cache_lengths_B,
    api.pack(tail_BTT),
    implementation=kernel,
    spec=spec,
  )


def xla_attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  allowed_BTS: jax.Array,
) -> jax.Array:
  """Attention to a cache, without moving it.

  JAX's own has the keys on the right, for which XLA transposes all of them in
  every layer of every step: on a CPU that is half of the time.

  Args:
    q_BTNH: Queries.
    k_BSKH: Keys of the cache, the new tokens' written.
    v_BSKH: Values likewise.
    allowed_BTS: Who sees whom.
  """
  batch_size, num_queries, num_heads, head_dim = q_BTNH.shape
  num_kv_heads = k_BSKH.shape[2]
  group = num_heads // num_kv_heads
  # R: the queries of all heads that share a key head.
  q_BKRH = (
    (q_BTNH * head_dim**-0.5)
    .reshape(batch_size, num_queries, num_kv_heads, group, head_dim)
    .transpose(0, 2, 1, 3, 4)
    .reshape(batch_size, num_kv_heads, num_queries * group, head_dim)
  )
  k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
  rows = ((0, 1), (0, 1))
  scores_BKSR = jax.lax.dot_general(
    k_BKSH,
    q_BKRH,
    (((3,), (3,)), rows),
    preferred_element_type=jnp.float32,
  )
  allowed_BRS = jnp.repeat(allowed_BTS, group, axis=1)
  scores_BKSR = jnp.where(
    allowed_BRS.swapaxes(1, 2)[:, None], scores_BKSR, _FORBIDDEN
  )
  probs_BKSR = jax.nn.softmax(scores_BKSR, axis=2).astype(v_BSKH.dtype)
  y_BKRH = jax.lax.dot_general(probs_BKSR, v_BKSH, (((2,), (2,)), rows))
  y_BKTGH = y_BKRH.reshape(
    batch_size, num_kv_heads, num_queries, group, head_dim
  )
  return y_BKTGH.transpose(0, 2, 1, 3, 4).reshape(q_BTNH.shape)
