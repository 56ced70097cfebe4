"""Tree attention in plain JAX: the specification, and XLA's way."""

import jax
import jax.numpy as jnp

from efficient_llm.typing import Array, Bool, Float, Int, UInt32, typed

BITS_PER_WORD = 32


@typed
def attend(
  q_BTNH: Float[Array, 'B T N H'],
  keys_BKSH: Float[Array, 'B K S H'],
  values_BKSH: Float[Array, 'B K S H'],
  lengths_B: Int[Array, 'B'],
  masks_BTU: UInt32[Array, 'B T U'],
) -> Float[Array, 'B T N H']:
  """Attends from a draft tree to its cache and to its own ancestors.

  Arguments and result are those of `api.attend`. Scores and sums are float32;
  the weights are rounded to the values' type before the second product, as a
  matrix unit takes them. XLA reads the whole capacity, not the live part.
  """
  batch_size, num_tokens, num_heads, head_dim = q_BTNH.shape
  num_kv_heads, capacity = keys_BKSH.shape[1:3]
  group = num_heads // num_kv_heads
  visible_BTS = visible(lengths_B, masks_BTU, capacity=capacity)
  written_BS = jnp.arange(capacity) < lengths_B[:, None] + num_tokens
  # A weight of zero does not silence a NaN behind the tail.
  values_BKSH = jnp.where(written_BS[:, None, :, None], values_BKSH, 0)
  q_BTKGH = q_BTNH.reshape(
    batch_size, num_tokens, num_kv_heads, group, head_dim
  )
  scores_BKTGS = jnp.einsum(
    'BTKGH,BKSH->BKTGS',
    q_BTKGH,
    keys_BKSH,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  mask_BKTGS = visible_BTS[:, None, :, None]
  scores_BKTGS = jnp.where(mask_BKTGS, scores_BKTGS * head_dim**-0.5, -jnp.inf)
  top_BKTG1 = scores_BKTGS.max(-1, keepdims=True)
  # A query that sees nothing (padding of a tree) gets zeros.
  top_BKTG1 = jnp.where(jnp.isneginf(top_BKTG1), 0.0, top_BKTG1)
  weights_BKTGS = jnp.exp(scores_BKTGS - top_BKTG1)
  total_BKTG1 = weights_BKTGS.sum(-1, keepdims=True)
  out_BKTGH = jnp.einsum(
    'BKTGS,BKSH->BKTGH',
    weights_BKTGS.astype(values_BKSH.dtype),
    values_BKSH,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  out_BKTGH /= jnp.where(total_BKTG1 == 0, 1.0, total_BKTG1)
  out_BTKGH = out_BKTGH.transpose(0, 2, 1, 3, 4)
  return out_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)


@typed
def visible(
  lengths_B: Int[Array, 'B'],
  masks_BTU: UInt32[Array, 'B T U'],
  *,
  capacity: int,
) -> Bool[Array, 'B T S']:
  """Who sees what: the cache, and the set bits of the tail.

  Args:
    lengths_B: Tokens each row's cache holds before the tree.
    masks_BTU: Packed ancestors of each query, itself included.
    capacity: S, positions of the cache.
  """
  num_tokens = masks_BTU.shape[1]
  offsets_BS = jnp.arange(capacity) - lengths_B[:, None]
  tail_BS = jnp.clip(offsets_BS, 0, num_tokens - 1)
  words_BTS = jnp.take_along_axis(
    masks_BTU, (tail_BS // BITS_PER_WORD)[:, None], axis=2
  )
  shifts_BS = (tail_BS % BITS_PER_WORD).astype(jnp.uint32)
  bits_BTS = (words_BTS >> shifts_BS[:, None]) & 1
  in_tail_BS = (offsets_BS >= 0) & (offsets_BS < num_tokens)
  return (offsets_BS < 0)[:, None] | (in_tail_BS[:, None] & (bits_BTS == 1))
