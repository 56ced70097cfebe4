"""Rejection sampling of draft chains for Hopper GPUs (Pallas, Mosaic GPU).

A first sweep over target and draft logits finds the log-sum-exp of each row.
The few numbers a row that decide are plain JAX. A second sweep reads only the
two rows of the first rejection of a sequence. How a row is swept, and in which
memory, is in `pallas_gpu.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from efficient_llm.kernels.speculative_sampling import (
  gumbel,
  pallas_gpu,
  reference,
)
from efficient_llm.typing import Array


def reject_chain(
  target_logits_BWV: Array,
  draft_logits_BKV: Array,
  draft_tokens_BK: Array,
  coins_BK: Array,
  keys_B2: Array,
  *,
  interpret: Any = None,
) -> tuple[Array, Array]:
  """Accepts drafts and draws one more token, as `api.reject_chain` says.

  Args:
    target_logits_BWV: Of the target, behind the root and behind each draft.
    draft_logits_BKV: What each draft was drawn from.
    draft_tokens_BK: The drafts.
    coins_BK: Uniform in [0, 1).
    keys_B2: Key data for the token behind the accepted ones.
    interpret: Interpreter parameters, for tests.
  """
  num_drafts, vocab_size = draft_logits_BKV.shape[1:]
  p_total_BW = _totals(target_logits_BWV, interpret=interpret)
  q_total_BK = _totals(draft_logits_BKV, interpret=interpret)
  ids_BK1 = jnp.clip(draft_tokens_BK, 0, vocab_size - 1)[..., None]
  in_vocab_BK = ids_BK1[..., 0] == draft_tokens_BK
  p_BK, q_BK = (
    jnp.take_along_axis(logits, ids_BK1, -1)[..., 0].astype(jnp.float32)
    for logits in (target_logits_BWV[:, :-1], draft_logits_BKV)
  )
  p_BK, q_BK = p_BK - p_total_BW[:, :-1], q_BK - q_total_BK
  usable_BK = in_vocab_BK & jnp.isfinite(q_BK)
  num_accepted_B = reference.count_accepted(p_BK - q_BK, coins_BK, usable_BK)
  rejected_B = reference.rejected(num_accepted_B, usable_BK)
  draft_B = jnp.minimum(num_accepted_B, num_drafts - 1)
  rows_B2 = jnp.stack([num_accepted_B, draft_B], 1).astype(jnp.int32)
  totals_B2 = jnp.stack(
    [
      jnp.take_along_axis(p_total_BW, num_accepted_B[:, None], 1)[:, 0],
      jnp.take_along_axis(q_total_BK, draft_B[:, None], 1)[:, 0],
    ],
    1,
  )
  plain_B, residual_B, left_B = _draws(
    target_logits_BWV,
    draft_logits_BKV,
    rows_B2,
    totals_B2,
    keys_B2,
    interpret=interpret,
  )
  next_B = jnp.where(rejected_B & left_B, residual_B, plain_B)
  return num_accepted_B, next_B


def _totals(logits_BWV: Array, *, interpret: Any) -> Array:
  """The log-sum-exp of each row."""
  *shape, vocab_size = logits_BWV.shape
  logits_RV = logits_BWV.reshape(-1, vocab_size)

  def kernel(logits_ref: Any, top_ref: Any, sum_ref: Any) -> None:
    row, part = jax.lax.axis_index('row'), jax.lax.axis_index('part')

    def fold(_: Array, new_C: Array, start: Array, carry: Any) -> Any:
      top_C, sum_C = carry
      logits_C = pallas_gpu.load(
        logits_ref.at[row, pl.ds(start, pallas_gpu.COLUMNS)]
      )
      logits_C = jnp.where(new_C, logits_C, -jnp.inf)
      new_top_C = jnp.maximum(top_C, logits_C)
      # While all is -inf, subtract 0: the difference of infinities is NaN.
      shift_C = jnp.where(new_top_C == -jnp.inf, 0.0, new_top_C)
      sum_C = sum_C * jnp.exp(top_C - shift_C) + jnp.exp(logits_C - shift_C)
      return new_top_C, sum_C

    start = (
      pallas_gpu.filled(-jnp.inf, jnp.float32),
      pallas_gpu.filled(0.0, jnp.float32),
    )
    top_C, sum_C = pallas_gpu.sweep(logits_RV.shape, fold, start)
    top = jnp.max(top_C)
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    pallas_gpu.store(top_ref.at[row, part], top)
    pallas_gpu.store(
      sum_ref.at[row, part], jnp.sum(sum_C * jnp.exp(top_C - shift))
    )

  tops_RC, sums_RC = pallas_gpu.call(
    kernel,
    logits_RV.shape,
    (jnp.float32, jnp.float32),
    interpret=interpret,
    name='chain_totals',
  )(logits_RV)
  # A share without mass has the logarithm of zero.
  totals_R = jax.nn.logsumexp(tops_RC + jnp.log(sums_RC), -1)
  return totals_R.reshape(shape)


def _draws(
  target_logits_BWV: Array,
  draft_logits_BKV: Array,
  rows_B2: Array,
  totals_B2: Array,
  keys_B2: Array,
  *,
  interpret: Any,
) -> tuple[Array, Array, Array]:
  """A token of p, one of p - q, and whether rounding left any of p - q."""
  batch_size, _, vocab_size = target_logits_BWV.shape

  def kernel(
    rows_ref: Any,
    totals_ref: Any,
    keys_ref: Any,
    target_ref: Any,
    draft_ref: Any,
    *out_refs: Any,
  ) -> None:
    row, part = jax.lax.axis_index('row'), jax.lax.axis_index('part')
    target_row, draft_row = rows_ref[row, 0], rows_ref[row, 1]
    p_total, q_total = totals_ref[row, 0], totals_ref[row, 1]
    first_key, second_key = keys_ref[row, 0], keys_ref[row, 1]

    def fold(ids_C: Array, _: Array, start: Array, carry: Any) -> Any:
      columns = pl.ds(start, pallas_gpu.COLUMNS)
      target_C = pallas_gpu.load(target_ref.at[row, target_row, columns])
      draft_C = pallas_gpu.load(draft_ref.at[row, draft_row, columns])
      noise_C = gumbel.noise(first_key, second_key, ids_C)
      left_C = jnp.exp(target_C - p_total) - jnp.exp(draft_C - q_total)
      residual_C = jnp.where(left_C > 0, jnp.log(left_C), -jnp.inf)
      plain = pallas_gpu.better(target_C + noise_C, ids_C, carry[:2])
      return *plain, *pallas_gpu.better(residual_C + noise_C, ids_C, carry[2:])

    start = (*pallas_gpu.no_best(), *pallas_gpu.no_best())
    carry = pallas_gpu.sweep((batch_size, vocab_size), fold, start)
    plain = pallas_gpu.overall(carry[:2], vocab_size)
    residual = pallas_gpu.overall(carry[2:], vocab_size)
    for ref, value in zip(out_refs, (*plain, *residual), strict=True):
      pallas_gpu.store(ref.at[row, part], value)

  plain_BC, plain_ids_BC, residual_BC, residual_ids_BC = pallas_gpu.call(
    kernel,
    (batch_size, vocab_size),
    (jnp.float32, jnp.int32, jnp.float32, jnp.int32),
    interpret=interpret,
    name='chain_draw',
  )(
    rows_B2,
    totals_B2,
    jax.lax.bitcast_convert_type(keys_B2, jnp.int32),
    target_logits_BWV,
    draft_logits_BKV,
  )
  return (
    pallas_gpu.join(plain_BC, plain_ids_BC),
    pallas_gpu.join(residual_BC, residual_ids_BC),
    (residual_BC > -jnp.inf).any(-1),
  )
