"""Token sampling for Hopper GPUs (Pallas, Mosaic GPU), and its sweep.

A block of 128 threads takes one row and a share of the vocabulary, so that few
rows still fill the chip, and streams it from global memory through registers,
1024 columns a step, 8 a thread, next to each other across threads. Every thread
keeps its own running results; they meet once, at the end. The noise is made
where it is added (`gumbel.py`); XLA joins the shares.

The last step of a row starts early enough to stay inside it, so it may see
columns twice. A row must therefore hold 1024 tokens.

Memory of a block of threads: registers (a step's 8 or 16 logits of a thread,
its running results, the words of the generator), and 16 B of shared memory in
which the four warps' results meet.

Checked in the interpreter and by compiling for an H100; not yet run on a GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_llm.kernels.speculative_sampling import gumbel
from efficient_llm.typing import Array

COLUMNS = 1024
_THREADS = 128
# Four blocks of threads on each core of an H100 or H200.
_NUM_PLACES = 4 * 132


def sample_tokens(
  logits_RV: Array,
  keys_R2: Array,
  *,
  temperature: float,
  interpret: Any = None,
) -> Array:
  """Draws as `api.sample_tokens` says.

  Args:
    logits_RV: Unnormalised log-probabilities; V is at least 1024.
    keys_R2: Key data of each row.
    temperature: 0 takes the likeliest.
    interpret: Interpreter parameters, for tests.
  """

  def kernel(
    keys_ref: Any, logits_ref: Any, best_ref: Any, id_ref: Any
  ) -> None:
    row, part = jax.lax.axis_index('row'), jax.lax.axis_index('part')
    first_key, second_key = keys_ref[row, 0], keys_ref[row, 1]

    def fold(ids_C: Array, _: Array, start: Array, carry: Any) -> Any:
      scores_C = load(logits_ref.at[row, pl.ds(start, COLUMNS)])
      if temperature != 0:
        scores_C = scores_C / temperature
        scores_C = scores_C + gumbel.noise(first_key, second_key, ids_C)
      return better(scores_C, ids_C, carry)

    carry = sweep(logits_RV.shape, fold, no_best())
    best, token = overall(carry, logits_RV.shape[-1])
    store(best_ref.at[row, part], best)
    store(id_ref.at[row, part], token)

  keys_R2 = jax.lax.bitcast_convert_type(keys_R2, jnp.int32)
  best_RC, ids_RC = call(
    kernel,
    logits_RV.shape,
    (jnp.float32, jnp.int32),
    interpret=interpret,
    name='sample_tokens',
  )(keys_R2, logits_RV)
  return join(best_RC, ids_RC)


def _num_parts(shape: tuple[int, ...]) -> int:
  """Shares of the vocabulary that fill the chip, a step each at the least."""
  num_rows, vocab_size = shape
  num_steps = pl.cdiv(vocab_size, COLUMNS)
  return min(pl.cdiv(_NUM_PLACES, num_rows), num_steps)


def call(
  kernel: Any,
  shape: tuple[int, ...],
  dtypes: tuple[Any, ...],
  *,
  interpret: Any,
  name: str,
) -> Any:
  """A kernel over rows and shares, with one number of each dtype for each."""
  num_parts = _num_parts(shape)
  more = {} if interpret is None else {'interpret': interpret}
  # A register of a thread is the least that is stored, so each has one.
  out_shape = (shape[0], num_parts, _THREADS)
  call = plgpu.kernel(
    kernel,
    out_type=[jax.ShapeDtypeStruct(out_shape, dtype) for dtype in dtypes],
    grid=(num_parts, shape[0]),
    grid_names=('part', 'row'),
    kernel_name=name,
    **more,
  )
  return lambda *arrays: [out[..., 0] for out in call(*arrays)]


def join(best_RC: Array, ids_RC: Array) -> Array:
  """The token of the best share; the first of equals holds the lower ids."""
  part_R1 = jnp.argmax(best_RC, -1, keepdims=True)
  return jnp.take_along_axis(ids_RC, part_R1, -1)[:, 0]


def _layout() -> Any:
  return plgpu.Layout.WG_STRIDED((COLUMNS,), vec_size=1)


def filled(value: float, dtype: Any) -> Array:
  """A constant for every column of a step."""
  return plgpu.layout_cast(jnp.full((COLUMNS,), value, dtype), _layout())


def load(ref: Any) -> Array:
  """The logits of a step, in float32."""
  return plgpu.layout_cast(ref[...], _layout()).astype(jnp.float32)


def store(ref: Any, value: Array) -> None:
  """Writes a number once for each thread."""
  layout = plgpu.Layout.WG_STRIDED((_THREADS,), vec_size=1)
  ref[...] = plgpu.layout_cast(jnp.full((_THREADS,), value), layout)


def sweep(shape: tuple[int, ...], fold: Any, carry: Any) -> Any:
  """Folds the steps of this block of threads' share of the vocabulary.

  Args:
    shape: Rows and columns.
    fold: Takes tokens, whether each is seen for the first time, the first
      column and the carry.
    carry: To start with.
  """
  vocab_size = shape[-1]
  num_steps = pl.cdiv(vocab_size, COLUMNS)
  share = pl.cdiv(num_steps, _num_parts(shape))
  first = jax.lax.axis_index('part') * share
  columns_C = plgpu.broadcasted_iota(jnp.int32, (COLUMNS,), 0, layout=_layout())

  def body(step: Any, carry: Any) -> Any:
    wanted = step * COLUMNS
    start = jnp.minimum(wanted, vocab_size - COLUMNS)
    ids_C = columns_C + start
    return fold(ids_C, ids_C >= wanted, start, carry)

  end = jnp.minimum(first + share, num_steps)
  return jax.lax.fori_loop(first, end, body, carry)


def no_best() -> tuple[Array, Array]:
  """What `better` starts with."""
  return filled(-jnp.inf, jnp.float32), filled(0, jnp.int32)


def better(scores_C: Array, ids_C: Array, carry: Any) -> tuple[Array, Array]:
  """Each thread's best so far; NaN counts as the largest, as for argmax."""
  best_C, best_ids_C = carry
  scores_C = jnp.where(scores_C != scores_C, jnp.inf, scores_C)
  better_C = scores_C > best_C
  return (
    jnp.where(better_C, scores_C, best_C),
    jnp.where(better_C, ids_C, best_ids_C),
  )


def overall(carry: Any, vocab_size: int) -> tuple[Array, Array]:
  """The best of all threads, the lowest token of equals."""
  best_C, ids_C = carry
  best = jnp.max(best_C)
  return best, jnp.min(jnp.where(best_C == best, ids_C, vocab_size))
