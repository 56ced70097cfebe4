"""Token sampling for TPUs (Pallas, Mosaic TPU).

The vocabulary streams through in blocks of columns, 8 rows a step, and each
logit is read once. Nothing as long as the vocabulary is written: the Gumbel
noise is made from the key where it is added (`gumbel.py`).

Memory of a grid step in float32:

  VMEM  logits        2 x 8 x 4096       256 KiB   two buffers, streamed
        noise, scores 8 x 8 x 4096         1 MiB   about 8 values in flight
        keys, tokens  2 x 2 x 8 x 128     16 KiB   columns pad to 128 lanes
        best, index   2 x 8 x 128          8 KiB

The 20 rounds of the generator, about 120 integer operations a logit, outweigh
reading it; block sizes are chosen, not tuned: nobody has timed them on a TPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_llm.kernels.speculative_sampling import gumbel
from efficient_llm.typing import Array

# Rows of a float32 register.
SUBLANES = 8
_COLUMNS = 4096


def sample_tokens(
  logits_RV: Array,
  keys_R2: Array,
  *,
  temperature: float,
  columns: int = _COLUMNS,
  interpret: Any = False,
) -> Array:
  """Draws as `api.sample_tokens` says.

  Args:
    logits_RV: Unnormalised log-probabilities.
    keys_R2: Key data of each row.
    temperature: 0 takes the likeliest.
    columns: Of a block of logits.
    interpret: False compiles; else interpreter parameters, for tests.
  """
  num_rows, vocab_size = logits_RV.shape
  rows, columns = min(num_rows, SUBLANES), min(columns, vocab_size)
  column_spec = pl.BlockSpec((rows, 1), lambda row, _: (row, 0))
  tokens_R1 = pl.pallas_call(
    functools.partial(_kernel, temperature=temperature, vocab_size=vocab_size),
    grid=(pl.cdiv(num_rows, rows), pl.cdiv(vocab_size, columns)),
    in_specs=[
      pl.BlockSpec((rows, 2), lambda row, _: (row, 0)),
      pl.BlockSpec((rows, columns), lambda row, column: (row, column)),
    ],
    out_specs=column_spec,
    out_shape=jax.ShapeDtypeStruct((num_rows, 1), jnp.int32),
    scratch_shapes=[
      pltpu.VMEM((rows, 1), jnp.float32),
      pltpu.VMEM((rows, 1), jnp.int32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='sample_tokens',
  )(jax.lax.bitcast_convert_type(keys_R2, jnp.int32), logits_RV)
  return tokens_R1[:, 0]


def ids(shape: tuple[int, ...], step: Array) -> Array:
  """Token of each column of a block."""
  axis = len(shape) - 1
  return step * shape[-1] + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def best(
  scores_RV: Array, ids_RV: Array, vocab_size: int
) -> tuple[Array, Array]:
  """The largest score of each row and the first token that has it.

  Counts NaN as the largest, as argmax does.
  """
  scores_RV = jnp.where(jnp.isnan(scores_RV), jnp.inf, scores_RV)
  # The last block may reach behind the vocabulary.
  scores_RV = jnp.where(ids_RV < vocab_size, scores_RV, -jnp.inf)
  best_R1 = scores_RV.max(1, keepdims=True)
  first_RV = jnp.where(scores_RV == best_R1, ids_RV, vocab_size)
  return best_R1, first_RV.min(1, keepdims=True)


def _kernel(
  keys_ref: Any,
  logits_ref: Any,
  out_ref: Any,
  best_ref: Any,
  index_ref: Any,
  *,
  temperature: float,
  vocab_size: int,
) -> None:
  """Keeps the best of logit plus noise, and where it was."""
  step = pl.program_id(1)
  ids_RV = ids(logits_ref.shape, step)

  @pl.when(step == 0)
  def _start() -> None:
    best_ref[...] = jnp.full_like(best_ref, -jnp.inf)
    index_ref[...] = jnp.zeros_like(index_ref)

  scores_RV = logits_ref[...].astype(jnp.float32)
  if temperature != 0:
    scores_RV = scores_RV / temperature
    scores_RV += gumbel.noise(keys_ref[:, 0:1], keys_ref[:, 1:2], ids_RV)
  best_R1, index_R1 = best(scores_RV, ids_RV, vocab_size)
  # Strictly better, so that the first of equals stays.
  better_R1 = best_R1 > best_ref[...]
  index_ref[...] = jnp.where(better_R1, index_R1, index_ref[...])
  best_ref[...] = jnp.where(better_R1, best_R1, best_ref[...])

  @pl.when(step == pl.num_programs(1) - 1)
  def _finish() -> None:
    out_ref[...] = index_ref[...]
