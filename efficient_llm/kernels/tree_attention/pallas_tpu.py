"""Tree attention for TPUs (Pallas, Mosaic TPU), forward only.

One grid step holds one block of keys and values of one row and one key/value
head; the grid walks (row, head, block) with the blocks innermost. All T tokens
of the tree and all G query heads of the group attend to the block at once, as
R = T * G rows of one matrix product, so keys and values are read once.

Blocks behind a row's tail are not read: the index map, which sees the lengths
as prefetched scalars, names the last live block again, and the pipeline copies
a block only when its index changes.

Memory of a grid step, with 2-byte types, H = 128, T = 16, G = 4 (R = 64) and
blocks of 1024 positions; the pipeline keeps two buffers of what it streams:

  SMEM  lengths_B                 4 B a row of the batch
  VMEM  keys      2 x S_block x H     512 KiB
        values    2 x S_block x H     512 KiB
        queries   2 x R x H            32 KiB
        output    2 x R x H            32 KiB
        words     2 x R x 128 lanes    64 KiB   int32; U words pad to 128 lanes
        top, sum  2 x R x 128 lanes    64 KiB   float32; one column pads too
        sums of values  R x H          32 KiB   float32
        scores, weights, mask  3 x R x S_block  768 KiB   float32, in flight

Together 2 MiB of the 16 MiB that v5e gives a kernel. `vmem_bytes` computes it
and `block_size` shrinks the block where the rows are many. Block sizes are
chosen by that budget, not tuned: nobody has timed them on a TPU.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_llm.kernels.tree_attention import reference
from efficient_llm.typing import Array

VMEM_LIMIT_BYTES = 12 * 2**20
_LANES = 128
_MAX_BLOCK = 1024
# Most rows x positions of the float32 matrix of scores: 1 MiB.
_MAX_SCORES = 2**18
# Finite, so that the difference of two is not NaN.
_LOWEST = -1e30


def block_size(num_rows: int, capacity: int) -> int:
  """Positions of a block: a multiple of the lanes, or the whole cache.

  Args:
    num_rows: R, tokens of the tree times query heads of a group.
    capacity: S, positions of the cache.
  """
  block = _MAX_BLOCK
  while block > _LANES and num_rows * block > _MAX_SCORES:
    block //= 2
  return min(block, capacity)


def vmem_bytes(
  *, num_rows: int, capacity: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> int:
  """Vector memory of a grid step, buffer by buffer as listed above."""
  itemsize = jnp.dtype(dtype).itemsize
  block = block_size(num_rows, capacity)
  lanes = math.ceil(head_dim / _LANES) * _LANES
  streamed = 2 * (2 * block + 2 * num_rows) * lanes * itemsize
  columns = (2 + 2) * num_rows * _LANES * 4
  return streamed + columns + num_rows * lanes * 4 + 3 * num_rows * block * 4


def live_block(
  step: Array, length: Array, *, num_tokens: int, block: int
) -> Array:
  """The block that a step reads: its own, or the last that matters.

  Args:
    step: Of the grid, along the cache.
    length: Tokens of the row before the tree.
    num_tokens: T, tokens of the tree.
    block: Positions of a block.
  """
  return jnp.minimum(step, (length + num_tokens - 1) // block)


def attend(
  q_BTNH: Array,
  keys_BKSH: Array,
  values_BKSH: Array,
  lengths_B: Array,
  masks_BTU: Array,
  *,
  block: int | None = None,
  interpret: Any = False,
) -> Array:
  """Attends as `api.attend` says.

  Args:
    q_BTNH: Queries of the tree.
    keys_BKSH: Keys, the tree's own behind each row's length.
    values_BKSH: Values likewise.
    lengths_B: Tokens before the tree.
    masks_BTU: Packed ancestors.
    block: Positions of a block; None chooses.
    interpret: False compiles; else interpreter parameters, for tests.
  """
  batch_size, num_tokens, num_heads, head_dim = q_BTNH.shape
  num_kv_heads, capacity = keys_BKSH.shape[1:3]
  group = num_heads // num_kv_heads
  num_rows = num_tokens * group
  block = block or block_size(num_rows, capacity)
  num_blocks = pl.cdiv(capacity, block)
  q_BKTGH = q_BTNH.reshape(
    batch_size, num_tokens, num_kv_heads, group, head_dim
  ).transpose(0, 2, 1, 3, 4)
  q_BKRH = q_BKTGH.reshape(batch_size, num_kv_heads, num_rows, head_dim)
  words_BTU = jax.lax.bitcast_convert_type(masks_BTU, jnp.int32)
  words_BRU = jnp.repeat(words_BTU, group, axis=1)

  def query_index(row: Array, head: Array, _: Array, __: Any) -> Any:
    return row, head, 0, 0

  def key_index(row: Array, head: Array, step: Array, lengths: Any) -> Any:
    live = live_block(step, lengths[row], num_tokens=num_tokens, block=block)
    return row, head, live, 0

  def word_index(row: Array, _: Array, __: Array, ___: Any) -> Any:
    return row, 0, 0

  query_spec = pl.BlockSpec((1, 1, num_rows, head_dim), query_index)
  key_spec = pl.BlockSpec((1, 1, block, head_dim), key_index)
  word_spec = pl.BlockSpec((1, num_rows, masks_BTU.shape[2]), word_index)
  column = pltpu.VMEM((num_rows, 1), jnp.float32)
  out_BKRH = pl.pallas_call(
    functools.partial(_kernel, num_tokens=num_tokens),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(batch_size, num_kv_heads, num_blocks),
      in_specs=[query_spec, key_spec, key_spec, word_spec],
      out_specs=query_spec,
      scratch_shapes=[
        column,
        column,
        pltpu.VMEM((num_rows, head_dim), jnp.float32),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(q_BKRH.shape, q_BKRH.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='tree_attention',
  )(lengths_B.astype(jnp.int32), q_BKRH, keys_BKSH, values_BKSH, words_BRU)
  out_BKTGH = out_BKRH.reshape(q_BKTGH.shape)
  return out_BKTGH.transpose(0, 2, 1, 3, 4).reshape(q_BTNH.shape)


def _kernel(
  lengths_ref: Any,
  q_ref: Any,
  keys_ref: Any,
  values_ref: Any,
  words_ref: Any,
  out_ref: Any,
  top_ref: Any,
  sum_ref: Any,
  acc_ref: Any,
  *,
  num_tokens: int,
) -> None:
  """Folds one block of keys and values into the running softmax."""
  step = pl.program_id(2)
  block = keys_ref.shape[2]
  length = lengths_ref[pl.program_id(0)]
  start = step * block

  @pl.when(step == 0)
  def _start() -> None:
    top_ref[...] = jnp.full_like(top_ref, _LOWEST)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  def fold(visible_RS: Array | None, values_SH: Array) -> None:
    scores_RS = _dot(q_ref[0, 0], keys_ref[0, 0], contract=1)
    scores_RS *= q_ref.shape[-1] ** -0.5
    if visible_RS is not None:
      scores_RS = jnp.where(visible_RS, scores_RS, _LOWEST)
    top_R1 = jnp.maximum(top_ref[...], scores_RS.max(1, keepdims=True))
    weights_RS = jnp.exp(scores_RS - top_R1)
    if visible_RS is not None:
      # A row that sees nothing yet has scores equal to its top.
      weights_RS = jnp.where(visible_RS, weights_RS, 0.0)
    decay_R1 = jnp.exp(top_ref[...] - top_R1)
    top_ref[...] = top_R1
    sum_ref[...] = sum_ref[...] * decay_R1 + weights_RS.sum(1, keepdims=True)
    weights_RS = weights_RS.astype(values_SH.dtype)
    acc_ref[...] = acc_ref[...] * decay_R1 + _dot(
      weights_RS, values_SH, contract=0
    )

  @pl.when(start + block <= length)
  def _all_visible() -> None:
    fold(None, values_ref[0, 0])

  # The blocks that hold the tail, and at the end what the memory held before.
  @pl.when((start + block > length) & (start < length + num_tokens))
  def _partly_visible() -> None:
    positions_S1 = start + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
    written_S1 = positions_S1 < length + num_tokens
    values_SH = jnp.where(written_S1, values_ref[0, 0], 0)
    fold(_visible(words_ref[0], start - length, num_tokens, block), values_SH)

  @pl.when(step == pl.num_programs(2) - 1)
  def _finish() -> None:
    total_R1 = jnp.where(sum_ref[...] == 0, 1.0, sum_ref[...])
    out_ref[0, 0] = (acc_ref[...] / total_R1).astype(out_ref.dtype)


def _visible(
  words_RU: Array, offset: Array, num_tokens: int, block: int
) -> Array:
  """What each row sees of a block whose first position is length + offset."""
  num_rows, num_words = words_RU.shape
  shape = (num_rows, block)
  offsets_RS = offset + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  shifts_RS = offsets_RS & (reference.BITS_PER_WORD - 1)
  bits_RS = jnp.zeros(shape, jnp.int32)
  for index in range(num_words):
    first = index * reference.BITS_PER_WORD
    here_RS = (offsets_RS >= first) & (
      offsets_RS < first + reference.BITS_PER_WORD
    )
    word_RS = jnp.broadcast_to(words_RU[:, index : index + 1], shape)
    bit_RS = jax.lax.shift_right_logical(word_RS, shifts_RS) & 1
    bits_RS = jnp.where(here_RS, bit_RS, bits_RS)
  in_tree_RS = (bits_RS == 1) & (offsets_RS < num_tokens)
  return (offsets_RS < 0) | in_tree_RS


def _dot(left: Array, right: Array, *, contract: int) -> Array:
  """Sums the last axis of `left` with one of `right`, in float32."""
  full = left.dtype == jnp.float32
  return jax.lax.dot_general(
    left,
    right,
    (((1,), (contract,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if full else None,
    preferred_element_type=jnp.float32,
  )
