"""Speculative sampling in plain JAX: the specification, and XLA's way."""

import jax
import jax.numpy as jnp

from efficient_llm.typing import Array, Float, Int, UInt32, typed


@typed
def sample_tokens(
  logits_RV: Float[Array, 'R V'],
  keys_R2: UInt32[Array, 'R 2'],
  *,
  temperature: float | int,
) -> Int[Array, 'R']:
  """Draws a token a row, as `api.sample_tokens` says."""
  logits_RV = logits_RV.astype(jnp.float32)
  if temperature == 0:
    return jnp.argmax(logits_RV, -1).astype(jnp.int32)
  keys_R = jax.random.wrap_key_data(keys_R2, impl='threefry2x32')
  drawn_R = jax.vmap(jax.random.categorical)(keys_R, logits_RV / temperature)
  return drawn_R.astype(jnp.int32)


@typed
def reject_chain(
  target_logits_BWV: Float[Array, 'B W V'],
  draft_logits_BKV: Float[Array, 'B K V'],
  draft_tokens_BK: Int[Array, 'B K'],
  coins_BK: Float[Array, 'B K'],
  keys_B2: UInt32[Array, 'B 2'],
) -> tuple[Int[Array, 'B'], Int[Array, 'B']]:
  """Accepts drafts and draws one more token, as `api.reject_chain` says."""
  num_drafts, vocab_size = draft_logits_BKV.shape[1:]
  target_logits_BWV = target_logits_BWV.astype(jnp.float32)
  p_BWV = jax.nn.log_softmax(target_logits_BWV, -1)
  q_BKV = jax.nn.log_softmax(draft_logits_BKV.astype(jnp.float32), -1)
  ids_BK1 = jnp.clip(draft_tokens_BK, 0, vocab_size - 1)[..., None]
  in_vocab_BK = ids_BK1[..., 0] == draft_tokens_BK
  p_BK = jnp.take_along_axis(p_BWV[:, :-1], ids_BK1, -1)[..., 0]
  q_BK = jnp.take_along_axis(q_BKV, ids_BK1, -1)[..., 0]
  usable_BK = in_vocab_BK & jnp.isfinite(q_BK)
  num_accepted_B = count_accepted(p_BK - q_BK, coins_BK, usable_BK)
  at_B11 = num_accepted_B[:, None, None]
  target_BV = jnp.take_along_axis(target_logits_BWV, at_B11, 1)[:, 0]
  p_BV = jnp.take_along_axis(p_BWV, at_B11, 1)[:, 0]
  draft_B11 = jnp.minimum(at_B11, num_drafts - 1)
  q_BV = jnp.take_along_axis(q_BKV, draft_B11, 1)[:, 0]
  rejected_B = rejected(num_accepted_B, usable_BK)
  residual_BV = jnp.maximum(jnp.exp(p_BV) - jnp.exp(q_BV), 0.0)
  # Where p and q are equal up to rounding nothing is left of p - q.
  subtract_B1 = rejected_B[:, None] & (residual_BV > 0).any(-1, keepdims=True)
  scores_BV = jnp.where(subtract_B1, jnp.log(residual_BV), target_BV)
  return num_accepted_B, sample_tokens(scores_BV, keys_B2, temperature=1.0)


def count_accepted(
  log_ratio_BK: Array, coins_BK: Array, usable_BK: Array
) -> Array:
  """Drafts accepted before the first that is not.

  Args:
    log_ratio_BK: log p(x) - log q(x) of the draft tokens x.
    coins_BK: Uniform in [0, 1).
    usable_BK: Whether there is a draft at all.
  """
  accepted_BK = usable_BK & (coins_BK < jnp.exp(log_ratio_BK))
  return jnp.cumprod(accepted_BK.astype(jnp.int32), 1).sum(1)


def rejected(num_accepted_B: Array, usable_BK: Array) -> Array:
  """Whether a row ends with a rejected draft, so that q has to be subtracted.

  Args:
    num_accepted_B: From `count_accepted`.
    usable_BK: Whether there is a draft at all.
  """
  num_drafts = usable_BK.shape[1]
  last_B1 = jnp.minimum(num_accepted_B, num_drafts - 1)[:, None]
  usable_B = jnp.take_along_axis(usable_BK, last_B1, 1)[:, 0]
  return (num_accepted_B < num_drafts) & usable_B
