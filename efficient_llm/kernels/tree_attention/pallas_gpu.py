"""Tree attention for Hopper GPUs (Pallas, Mosaic GPU), forward only.

A block of threads takes 64 rows of queries (T tokens times G query heads of a
group, padded to whole tiles) of one row and key/value head, and a share of the
row's live cache: at batch 1 a head alone would leave most of the chip idle. It
streams its blocks of keys and values through a ring in shared memory, keeps a
running softmax in registers, and writes its part with its log-sum-exp; XLA
joins the parts. Blocks behind a row's tail are never asked for, as each block
of threads reads the length and counts its own.

Shared memory at H = 128, in 2-byte types (227 KiB are there):

  keys     4 x 64 x H    64 KiB   a ring of blocks of 64 positions
  values   4 x 64 x H    64 KiB
  queries  64 x H        16 KiB
  output   64 x H        32 KiB   float32, on its way out
  words    U x 64       512 B     int32, at U = 2
  sums     64           256 B     float32 log-sum-exps

Registers of each of the 128 threads: 64 of output sums and 32 of scores in
float32, 16 of weights in 2-byte pairs, the running maximum and sum.

Checked in the interpreter and by compiling for an H100; not yet run on a GPU.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_llm.kernels.tree_attention import reference
from efficient_llm.typing import Array

# Rows that a matrix instruction of a warpgroup takes.
ROWS = 64
BLOCK = 64
_STAGES = 4
# Blocks of threads that fill an H100 or H200 once.
_NUM_CORES = 132
# Finite, so that the difference of two is not NaN.
_LOWEST = -1e30
_LOG2_E = math.log2(math.e)


def attend(
  q_BTNH: Array,
  keys_BKSH: Array,
  values_BKSH: Array,
  lengths_B: Array,
  masks_BTU: Array,
  *,
  num_parts: int | None = None,
  interpret: Any = None,
) -> Array:
  """Attends as `api.attend` says.

  Args:
    q_BTNH: Queries of the tree, in a 2-byte type; H is 64 or 128.
    keys_BKSH: Keys, the tree's own behind each row's length; S is a multiple
      of 64.
    values_BKSH: Values likewise.
    lengths_B: Tokens before the tree.
    masks_BTU: Packed ancestors.
    num_parts: Shares of the cache; None fills the chip.
    interpret: Interpreter parameters, for tests.
  """
  batch_size, num_tokens, num_heads, head_dim = q_BTNH.shape
  num_kv_heads, capacity = keys_BKSH.shape[1:3]
  group = num_heads // num_kv_heads
  num_rows = num_tokens * group
  num_tiles = pl.cdiv(num_rows, ROWS)
  if num_parts is None:
    others = batch_size * num_kv_heads * num_tiles
    num_parts = min(pl.cdiv(_NUM_CORES, others), pl.cdiv(capacity, BLOCK))
  padding = num_tiles * ROWS - num_rows
  q_BKTGH = q_BTNH.reshape(
    batch_size, num_tokens, num_kv_heads, group, head_dim
  ).transpose(0, 2, 1, 3, 4)
  q_BKRH = q_BKTGH.reshape(batch_size, num_kv_heads, num_rows, head_dim)
  q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, padding), (0, 0)))
  words_BTU = jax.lax.bitcast_convert_type(masks_BTU, jnp.int32)
  words_BUR = jnp.repeat(words_BTU, group, axis=1).transpose(0, 2, 1)
  words_BUR = jnp.pad(words_BUR, ((0, 0), (0, 0), (0, padding)))
  part_shape = (num_parts, *q_BKRH.shape)
  more = {} if interpret is None else {'interpret': interpret}
  parts_CBKRH, sums_CBKR = plgpu.kernel(
    functools.partial(_kernel, num_tokens=num_tokens, num_parts=num_parts),
    out_type=[
      jax.ShapeDtypeStruct(part_shape, jnp.float32),
      jax.ShapeDtypeStruct(part_shape[:-1], jnp.float32),
    ],
    # Tiles of the same keys run side by side and share them in the L2 cache.
    grid=(num_tiles, num_parts, num_kv_heads, batch_size),
    grid_names=('tile', 'part', 'head', 'row'),
    scratch_types=_scratch(head_dim, masks_BTU.shape[2], q_BTNH.dtype),
    kernel_name='tree_attention',
    **more,
  )(lengths_B.astype(jnp.int32), q_BKRH, keys_BKSH, values_BKSH, words_BUR)
  weights_CBKR = jnp.exp2(sums_CBKR - sums_CBKR.max(0))
  weights_CBKR /= weights_CBKR.sum(0)
  out_BKRH = jnp.einsum('CBKR,CBKRH->BKRH', weights_CBKR, parts_CBKRH)
  out_BKTGH = out_BKRH[:, :, :num_rows].reshape(q_BKTGH.shape)
  out_BTKGH = out_BKTGH.transpose(0, 2, 1, 3, 4)
  return out_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def _scratch(head_dim: int, num_words: int, dtype: Any) -> list[Any]:
  """Shared memory and barriers, in the order that `_kernel` takes them."""

  def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (
      plgpu.TilingTransform((8, columns)),
      plgpu.SwizzleTransform(128),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)

  return [
    tiled((ROWS, head_dim), dtype),
    plgpu.SMEM((num_words, ROWS), jnp.int32),
    tiled((_STAGES, BLOCK, head_dim), dtype),
    tiled((_STAGES, BLOCK, head_dim), dtype),
    tiled((ROWS, head_dim), jnp.float32),
    plgpu.SMEM((ROWS,), jnp.float32),
    plgpu.Barrier(),
    plgpu.Barrier(),
    plgpu.Barrier(num_barriers=_STAGES),
    plgpu.Barrier(num_barriers=_STAGES),
  ]


def _kernel(
  lengths_ref: Any,
  q_ref: Any,
  keys_ref: Any,
  values_ref: Any,
  words_ref: Any,
  parts_ref: Any,
  sums_ref: Any,
  q_smem: Any,
  words_smem: Any,
  keys_smem: Any,
  values_smem: Any,
  out_smem: Any,
  sum_smem: Any,
  q_barrier: Any,
  words_barrier: Any,
  keys_barrier: Any,
  values_barrier: Any,
  *,
  num_tokens: int,
  num_parts: int,
) -> None:
  """Attends 64 rows to one part of the live cache."""
  tile, part, head, row = (
    jax.lax.axis_index(name) for name in ('tile', 'part', 'head', 'row')
  )
  head_dim = q_smem.shape[-1]
  scale = head_dim**-0.5 * _LOG2_E
  rows = pl.ds(tile * ROWS, ROWS)
  length = lengths_ref[row]
  live_blocks = jax.lax.div(length + num_tokens + BLOCK - 1, BLOCK)
  share = jax.lax.div(live_blocks + num_parts - 1, num_parts)
  first = part * share
  count = jnp.clip(live_blocks - first, 0, share)
  num_whole = jnp.clip(jax.lax.div(length, BLOCK) - first, 0, count)

  def fetch(index: Any) -> None:
    slot = jax.lax.rem(index, _STAGES)
    positions = pl.ds((first + index) * BLOCK, BLOCK)
    for source, target, barrier in (
      (keys_ref, keys_smem, keys_barrier),
      (values_ref, values_smem, values_barrier),
    ):
      plgpu.copy_gmem_to_smem(
        source.at[row, head, positions], target.at[slot], barrier.at[slot]
      )

  plgpu.copy_gmem_to_smem(q_ref.at[row, head, rows], q_smem, q_barrier)
  plgpu.copy_gmem_to_smem(words_ref.at[row, :, rows], words_smem, words_barrier)
  for index in range(_STAGES):
    pl.when(index < count)(functools.partial(fetch, jnp.int32(index)))
  plgpu.barrier_wait(q_barrier)
  plgpu.barrier_wait(words_barrier)

  def fold(index: Any, carry: Any, *, whole: bool) -> Any:
    top_R, sum_R, acc_RH = carry
    slot = jax.lax.rem(index, _STAGES)
    offset = (first + index) * BLOCK - length
    plgpu.barrier_wait(keys_barrier.at[slot])

    def score(scores_ref: Any) -> Any:
      plgpu.wgmma(scores_ref, q_smem, keys_smem.at[slot].T)
      return scores_ref[...]

    sums = plgpu.WGMMAAccumulatorRef((ROWS, BLOCK), jnp.float32)
    scores_RS = pl.run_scoped(score, sums)
    scores_RS = scores_RS * scale
    visible_RS = None
    if not whole:
      words = [
        plgpu.layout_cast(words_smem[word], plgpu.Layout.WGMMA.reduce(1))
        for word in range(words_smem.shape[0])
      ]
      visible_RS = _visible(words, offset, num_tokens)
      scores_RS = jnp.where(visible_RS, scores_RS, _LOWEST)
    new_top_R = jnp.maximum(top_R, scores_RS.max(axis=1))
    weights_RS = jnp.exp2(scores_RS - _columns(new_top_R, BLOCK))
    if visible_RS is not None:
      # A row that sees nothing yet has scores equal to its top.
      weights_RS = jnp.where(visible_RS, weights_RS, 0.0)
    decay_R = jnp.exp2(top_R - new_top_R)
    sum_R = sum_R * decay_R + weights_RS.sum(axis=1)
    acc_RH = acc_RH * _columns(decay_R, head_dim)
    plgpu.barrier_wait(values_barrier.at[slot])
    if not whole:
      _silence(values_smem.at[slot], num_tokens - offset)

    def weigh(acc_ref: Any) -> None:
      weights = weights_RS.astype(values_smem.dtype)
      plgpu.wgmma(acc_ref, weights, values_smem.at[slot])

    acc_RH = pl.run_state(weigh)(plgpu.WGMMAAccumulatorRef.init(acc_RH))
    # All four warps are done with the slot before it is written again.
    plgpu.commit_smem()
    pl.when(index + _STAGES < count)(functools.partial(fetch, index + _STAGES))
    return new_top_R, sum_R, acc_RH

  carry = (
    _filled((ROWS,), _LOWEST),
    _filled((ROWS,), 0.0),
    _filled((ROWS, head_dim), 0.0),
  )
  carry = jax.lax.fori_loop(
    0, num_whole, functools.partial(fold, whole=True), carry
  )
  top_R, sum_R, acc_RH = jax.lax.fori_loop(
    num_whole, count, functools.partial(fold, whole=False), carry
  )
  safe_R = jnp.where(sum_R == 0, 1.0, sum_R)
  out_smem[...] = acc_RH / _columns(safe_R, head_dim)
  sum_smem[...] = top_R + jnp.log(safe_R) * _LOG2_E
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(out_smem, parts_ref.at[part, row, head, rows])
  plgpu.copy_smem_to_gmem(sum_smem, sums_ref.at[part, row, head, rows])
  plgpu.wait_smem_to_gmem(0)


def _filled(shape: tuple[int, ...], value: float) -> Array:
  """A constant as the matrix unit lays out its results, or their rows."""
  layout = plgpu.Layout.WGMMA
  return plgpu.layout_cast(
    jnp.full(shape, value, jnp.float32),
    layout if len(shape) == 2 else layout.reduce(1),
  )


def _columns(x_R: Array, size: int) -> Array:
  """Repeats one value a row over all columns."""
  return jax.lax.broadcast_in_dim(x_R, (ROWS, size), [0])


def _visible(words: list[Array], offset: Array, num_tokens: int) -> Array:
  """What each row sees of a block whose first position is length + offset."""
  shape = (ROWS, BLOCK)
  offsets_RS = offset + plgpu.broadcasted_iota(
    jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
  )
  shifts_RS = offsets_RS & (reference.BITS_PER_WORD - 1)
  seen_RS = offsets_RS < 0
  for index, word_R in enumerate(words):
    first = index * reference.BITS_PER_WORD
    end = min(first + reference.BITS_PER_WORD, num_tokens)
    bits_RS = jax.lax.shift_right_logical(_columns(word_R, BLOCK), shifts_RS)
    here_RS = (offsets_RS >= first) & (offsets_RS < end)
    seen_RS = seen_RS | (here_RS & ((bits_RS & 1) == 1))
  return seen_RS


def _silence(values_ref: Any, num_written: Array) -> None:
  """Zeroes what lies behind the tail: a weight of zero keeps a NaN alive."""

  @pl.when(num_written < BLOCK)
  def _write() -> None:
    values_SH = plgpu.layout_cast(values_ref[...], plgpu.Layout.WGMMA)
    positions_SH = plgpu.broadcasted_iota(
      jnp.int32, values_ref.shape, 0, layout=plgpu.Layout.WGMMA
    )
    zeros_SH = jnp.zeros_like(values_SH)
    values_ref[...] = jnp.where(positions_SH < num_written, values_SH, zeros_SH)
    plgpu.commit_smem()
