"""Rejection sampling of draft chains for TPUs (Pallas, Mosaic TPU).

A first sweep over target and draft logits finds the log-sum-exp of each row and
the logit of its draft token. The few numbers a row that decide are plain JAX. A
second sweep reads only the rows around the first rejection of a sequence: 8, as
a register holds so many.

Memory of a grid step in float32, at W = 64 rows and blocks of 2048 columns:

  _statistics  VMEM  logits          2 x W x 2048       1 MiB  two buffers
                     scores          3 x W x 2048     1.5 MiB  in flight
                     tokens, results 2 x 3 x W x 128  192 KiB  columns pad to
                     top, sum, logit 3 x W x 128       96 KiB  128 lanes
  _draw        VMEM  both logits     2 x 2 x 8 x 2048 256 KiB  two buffers
                     noise, scores   10 x 2048         80 KiB  in flight
               SMEM  what was found, keys, tokens        28 B  a sequence
                     running bests                       16 B

A target array whose W is not a multiple of 8 may lie compactly in memory; XLA
then copies it into whole registers first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_llm.kernels.speculative_sampling import (
  gumbel,
  pallas_tpu,
  reference,
)
from efficient_llm.typing import Array

_COLUMNS = 2048


def reject_chain(
  target_logits_BWV: Array,
  draft_logits_BKV: Array,
  draft_tokens_BK: Array,
  coins_BK: Array,
  keys_B2: Array,
  *,
  columns: int = _COLUMNS,
  interpret: Any = False,
) -> tuple[Array, Array]:
  """Accepts drafts and draws one more token, as `api.reject_chain` says.

  Args:
    target_logits_BWV: Of the target, behind the root and behind each draft.
    draft_logits_BKV: What each draft was drawn from.
    draft_tokens_BK: The drafts.
    coins_BK: Uniform in [0, 1).
    keys_B2: Key data for the token behind the accepted ones.
    columns: Of a block of logits.
    interpret: False compiles; else interpreter parameters, for tests.
  """
  columns = min(columns, target_logits_BWV.shape[2])
  statistics = functools.partial(
    _statistics, columns=columns, interpret=interpret
  )
  # The row behind the last draft has no token to look up.
  tokens_BW = jnp.pad(draft_tokens_BK, ((0, 0), (0, 1)), constant_values=-1)
  p_total_BW, p_logit_BW = statistics(target_logits_BWV, tokens_BW)
  q_total_BK, q_logit_BK = statistics(draft_logits_BKV, draft_tokens_BK)
  p_BK = (p_logit_BW - p_total_BW)[:, :-1]
  q_BK = q_logit_BK - q_total_BK
  usable_BK = jnp.isfinite(q_BK)
  num_accepted_B = reference.count_accepted(p_BK - q_BK, coins_BK, usable_BK)
  rejected_B = reference.rejected(num_accepted_B, usable_BK)
  at_B1 = num_accepted_B[:, None]
  draft_B1 = jnp.minimum(at_B1, draft_tokens_BK.shape[1] - 1)
  next_B = _draw(
    target_logits_BWV,
    draft_logits_BKV,
    num_accepted_B,
    rejected_B.astype(jnp.int32),
    jnp.take_along_axis(p_total_BW, at_B1, 1)[:, 0],
    jnp.take_along_axis(q_total_BK, draft_B1, 1)[:, 0],
    keys_B2,
    columns=columns,
    interpret=interpret,
  )
  return num_accepted_B, next_B


@functools.partial(jax.jit, static_argnames=('columns', 'interpret'))
def _statistics(
  logits_BWV: Array, tokens_BW: Array, *, columns: int, interpret: Any
) -> tuple[Array, Array]:
  """The log-sum-exp of each row, and its logit at a token (-inf if none)."""
  batch_size, num_rows, vocab_size = logits_BWV.shape
  spec = pl.BlockSpec((1, num_rows, 1), lambda row, _: (row, 0, 0))
  shape = jax.ShapeDtypeStruct((batch_size, num_rows, 1), jnp.float32)
  column = pltpu.VMEM((num_rows, 1), jnp.float32)
  totals_BW1, found_BW1 = pl.pallas_call(
    functools.partial(_statistics_kernel, vocab_size=vocab_size),
    grid=(batch_size, pl.cdiv(vocab_size, columns)),
    in_specs=[
      spec,
      pl.BlockSpec(
        (1, num_rows, columns), lambda row, column: (row, 0, column)
      ),
    ],
    out_specs=[spec, spec],
    out_shape=[shape, shape],
    scratch_shapes=[column, column, column],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='chain_statistics',
  )(tokens_BW.astype(jnp.int32)[..., None], logits_BWV)
  return totals_BW1[..., 0], found_BW1[..., 0]


def _statistics_kernel(
  tokens_ref: Any,
  logits_ref: Any,
  total_ref: Any,
  found_ref: Any,
  top_ref: Any,
  sum_ref: Any,
  logit_ref: Any,
  *,
  vocab_size: int,
) -> None:
  """Folds one block of columns into the running sum of exponentials."""
  step = pl.program_id(1)
  ids_WV = pallas_tpu.ids(logits_ref.shape[1:], step)

  @pl.when(step == 0)
  def _start() -> None:
    top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    logit_ref[...] = jnp.full_like(logit_ref, -jnp.inf)

  logits_WV = logits_ref[0].astype(jnp.float32)
  logits_WV = jnp.where(ids_WV < vocab_size, logits_WV, -jnp.inf)
  top_W1 = jnp.maximum(top_ref[...], logits_WV.max(1, keepdims=True))
  # While all is -inf, subtract 0: the difference of infinities is NaN.
  shift_W1 = jnp.where(top_W1 == -jnp.inf, 0.0, top_W1)
  sums_W1 = jnp.exp(logits_WV - shift_W1).sum(1, keepdims=True)
  sum_ref[...] = sum_ref[...] * jnp.exp(top_ref[...] - shift_W1) + sums_W1
  top_ref[...] = top_W1
  here_WV = (ids_WV == tokens_ref[0]) & (ids_WV < vocab_size)
  logit_W1 = jnp.where(here_WV, logits_WV, -jnp.inf).max(1, keepdims=True)
  logit_ref[...] = jnp.maximum(logit_ref[...], logit_W1)

  @pl.when(step == pl.num_programs(1) - 1)
  def _finish() -> None:
    total_ref[0] = top_ref[...] + jnp.log(sum_ref[...])
    found_ref[0] = logit_ref[...]


@functools.partial(jax.jit, static_argnames=('columns', 'interpret'))
def _draw(
  target_logits_BWV: Array,
  draft_logits_BKV: Array,
  num_accepted_B: Array,
  rejected_B: Array,
  p_total_B: Array,
  q_total_B: Array,
  keys_B2: Array,
  *,
  columns: int,
  interpret: Any,
) -> Array:
  """Draws from p - q where a draft was rejected, and from p elsewhere."""
  batch_size, num_targets, vocab_size = target_logits_BWV.shape
  num_drafts = draft_logits_BKV.shape[1]
  target_rows = min(pallas_tpu.SUBLANES, num_targets)
  draft_rows = min(pallas_tpu.SUBLANES, num_drafts)

  def target_index(row: Array, step: Array, accepted: Any, *_: Any) -> Any:
    return row, accepted[row] // target_rows, step

  def draft_index(row: Array, step: Array, accepted: Any, *_: Any) -> Any:
    last = jnp.minimum(accepted[row], num_drafts - 1)
    return row, last // draft_rows, step

  return pl.pallas_call(
    functools.partial(
      _draw_kernel, vocab_size=vocab_size, num_drafts=num_drafts
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(batch_size, pl.cdiv(vocab_size, columns)),
      in_specs=[
        pl.BlockSpec((1, target_rows, columns), target_index),
        pl.BlockSpec((1, draft_rows, columns), draft_index),
      ],
      out_specs=pl.BlockSpec(memory_space=pltpu.SMEM),
      scratch_shapes=[
        pltpu.SMEM((2,), jnp.float32),
        pltpu.SMEM((2,), jnp.int32),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    # One output is shared by all rows, so that they go one after the other.
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('arbitrary', 'arbitrary')
    ),
    interpret=interpret,
    name='chain_draw',
  )(
    num_accepted_B.astype(jnp.int32),
    rejected_B,
    p_total_B,
    q_total_B,
    jax.lax.bitcast_convert_type(keys_B2, jnp.int32),
    target_logits_BWV,
    draft_logits_BKV,
  )


def _draw_kernel(
  accepted_ref: Any,
  rejected_ref: Any,
  p_total_ref: Any,
  q_total_ref: Any,
  keys_ref: Any,
  target_ref: Any,
  draft_ref: Any,
  out_ref: Any,
  best_ref: Any,
  index_ref: Any,
  *,
  vocab_size: int,
  num_drafts: int,
) -> None:
  """Keeps the best of p and of p - q: rounding may leave nothing of p - q."""
  row, step = pl.program_id(0), pl.program_id(1)
  at = accepted_ref[row]
  target_1V = _pick(target_ref, at)
  draft_1V = _pick(draft_ref, jnp.minimum(at, num_drafts - 1))
  ids_1V = pallas_tpu.ids(target_1V.shape, step)

  @pl.when(step == 0)
  def _start() -> None:
    for index in range(2):
      best_ref[index] = -jnp.inf
      index_ref[index] = 0

  noise_1V = gumbel.noise(keys_ref[row, 0], keys_ref[row, 1], ids_1V)
  p_1V = jnp.exp(target_1V - p_total_ref[row])
  q_1V = jnp.exp(draft_1V - q_total_ref[row])
  residual_1V = jnp.log(jnp.maximum(p_1V - q_1V, 0.0))
  for index, scores_1V in enumerate((target_1V, residual_1V)):
    best_11, id_11 = pallas_tpu.best(scores_1V + noise_1V, ids_1V, vocab_size)
    best, token = best_11[0, 0], id_11[0, 0]
    better = best > best_ref[index]
    index_ref[index] = jnp.where(better, token, index_ref[index])
    best_ref[index] = jnp.where(better, best, best_ref[index])

  @pl.when(step == pl.num_programs(1) - 1)
  def _finish() -> None:
    subtract = (rejected_ref[row] == 1) & (best_ref[1] > -jnp.inf)
    out_ref[row] = jnp.where(subtract, index_ref[1], index_ref[0])


def _pick(ref: Any, row: Array) -> Array:
  """One row, as float32, of the block of rows that holds it."""
  _, num_rows, columns = ref.shape
  rows_RV = jax.lax.broadcasted_iota(jnp.int32, (num_rows, columns), 0)
  logits_RV = ref[0].astype(jnp.float32)
  picked_RV = jnp.where(rows_RV == row % num_rows, logits_RV, 0.0)
  return picked_RV.sum(0, keepdims=True)
