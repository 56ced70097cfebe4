"""Speculative sampling: draws, and accepts or replaces drafts."""

from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm.kernels import selection
from efficient_llm.kernels.speculative_sampling import (
  gumbel,
  pallas_gpu,
  pallas_gpu_chain,
  pallas_tpu,
  pallas_tpu_chain,
  reference,
)
from efficient_llm.typing import Array, Float, Int, UInt32, typed

# What bounds the rows of a block that is as high as the chain.
MAX_CHAIN_TOKENS = 64


@typed
def sample_tokens(
  logits_RV: Float[Array, 'R V'],
  keys_R2: UInt32[Array, 'R 2'],
  *,
  temperature: float | int,
  implementation: selection.Implementation | None = None,
) -> Int[Array, 'R']:
  """Draws a token a row in one pass over the vocabulary.

  The tokens are those that `jax.vmap(jax.random.categorical)` draws with the
  same keys from logits / temperature: the largest sum of logit and Gumbel noise
  wins. A device whose logarithm rounds otherwise may differ where two sums are
  equal up to rounding. A token with a logit of -inf is drawn only where there
  is no other; NaN counts as the largest logit. Under a mesh XLA gathers what a
  Pallas kernel reads: call it inside `jax.shard_map`, on each device's rows.

  Args:
    logits_RV: Unnormalised log-probabilities, in nats.
    keys_R2: Key data of threefry keys.
    temperature: 0 takes the likeliest token, the first of equals.
    implementation: None chooses, see `choose`.
  Raises:
    ValueError: If the temperature is negative, or the implementation that was
      asked for cannot draw what `jax.random` draws.
  """
  if not 0 <= temperature < float('inf'):
    raise ValueError(f'{temperature=} must be 0 (likeliest) or positive.')
  modules = {
    'xla': reference,
    'pallas_tpu': pallas_tpu,
    'pallas_gpu': pallas_gpu,
  }
  return modules[_choose(implementation, logits_RV)].sample_tokens(
    logits_RV, keys_R2, temperature=temperature
  )


@typed
def reject_chain(
  target_logits_BWV: Float[Array, 'B W V'],
  draft_logits_BKV: Float[Array, 'B K V'],
  draft_tokens_BK: Int[Array, 'B K'],
  coins_BK: Float[Array, 'B K'],
  keys_B2: UInt32[Array, 'B 2'],
  *,
  implementation: selection.Implementation | None = None,
) -> tuple[Int[Array, 'B'], Int[Array, 'B']]:
  """Accepts drafts that were drawn from their own law, and draws one token.

  With p = softmax(target) and q = softmax(draft), draft x is accepted while
  coin < p(x) / q(x). The token behind the accepted ones is drawn from
  max(p - q, 0), normalised, after a rejection and from the last p otherwise.
  So every token has the target's law.

  A draft is absent where its logits are NaN or all -inf, give its token no
  mass, or its token is outside the vocabulary (such as -1, for shorter chains):
  it is rejected, and the token in its place is drawn from p itself.

  Args:
    target_logits_BWV: Of the target behind the root and behind each draft;
      W = K + 1. Temperature and truncation are already applied.
    draft_logits_BKV: What each draft was drawn from.
    draft_tokens_BK: The drafts.
    coins_BK: Uniform in [0, 1), for nothing but this.
    keys_B2: Key data of threefry keys, for nothing but the drawn token.
    implementation: None chooses, see `choose`.
  Returns:
    Accepted drafts of each row, in [0, K], and the token behind them.
  Raises:
    ValueError: If the shapes do not go together, or the implementation that
      was asked for cannot take them.
  Source: Leviathan et al. 2023, Algorithm 1, arXiv:2211.17192. Differs: the
    comparison is strict, so that a coin of 0 accepts no impossible token; all
    drafts of a batch are judged at once.
  """
  num_targets, num_drafts = target_logits_BWV.shape[1], draft_tokens_BK.shape[1]
  if num_targets != num_drafts + 1:
    raise ValueError(
      f'{num_targets=} rows of target logits must be {num_drafts=} and one; '
      'add the row behind the last draft.'
    )
  chosen = _choose(implementation, target_logits_BWV)
  if num_drafts == 0:
    tokens_B = sample_tokens(
      target_logits_BWV[:, 0], keys_B2, temperature=1.0, implementation=chosen
    )
    return jnp.zeros_like(tokens_B), tokens_B
  modules = {
    'xla': reference,
    'pallas_tpu': pallas_tpu_chain,
    'pallas_gpu': pallas_gpu_chain,
  }
  return modules[chosen].reject_chain(
    target_logits_BWV, draft_logits_BKV, draft_tokens_BK, coins_BK, keys_B2
  )


def choose(
  logits: Any, *, platform: str, device_kind: str = ''
) -> selection.Choice:
  """The implementation that None stands for, and why.

  Args:
    logits: [R, V] or [B, W, V], or only their shape and dtype.
    platform: As a device names it: 'cpu', 'gpu' or 'tpu'.
    device_kind: As a device names it, such as 'NVIDIA H200'.
  """
  return selection.decide(platform, device_kind, _refusals(logits))


def _choose(
  implementation: selection.Implementation | None, logits: Array
) -> selection.Implementation:
  """What was asked for if it can be had, or the choice."""
  if implementation is not None:
    return selection.check(implementation, _refusals(logits))
  device = jax.devices()[0]
  return choose(
    logits, platform=device.platform, device_kind=device.device_kind
  ).implementation


def _refusals(logits: Any) -> dict[selection.Implementation, str | None]:
  """Why each kernel cannot take these logits, if so."""
  if not gumbel.is_of_jax_random():
    noise = (
      'jax is configured for other noise (jax_threefry_partitionable off or '
      'jax_high_dynamic_range_gumbel on)'
    )
    return {'pallas_tpu': noise, 'pallas_gpu': noise}
  return {
    'pallas_tpu': _tpu_refusal(logits),
    'pallas_gpu': _gpu_refusal(logits),
  }


def _tpu_refusal(logits: Any) -> str | None:
  dtype = jnp.dtype(logits.dtype)
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f'it takes bfloat16 and float32, not {dtype}'
  if len(logits.shape) == 3 and logits.shape[1] > MAX_CHAIN_TOKENS:
    return f'a chain of {logits.shape[1]} rows exceeds {MAX_CHAIN_TOKENS}'
  return None


def _gpu_refusal(logits: Any) -> str | None:
  vocab_size = logits.shape[-1]
  if vocab_size < pallas_gpu.COLUMNS:
    return f'{vocab_size=} is less than a step of {pallas_gpu.COLUMNS}'
  return None
