"""The GPU kernels, interpreted, against the references."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from efficient_llm.kernels.speculative_sampling import pallas_gpu as sampling
from efficient_llm.kernels.speculative_sampling import (
  pallas_gpu_chain,
)
from efficient_llm.kernels.speculative_sampling import (
  reference as sampling_reference,
)
from efficient_llm.kernels.tree_attention import pallas_gpu, reference
from efficient_llm.typing import Array
from tests.kernels import trees

pytestmark = pytest.mark.skipif(
  not hasattr(plgpu, 'InterpretGPUParams'),
  reason=f'jax {jax.__version__} has no interpreter of GPU kernels',
)
# Weights and results of 8 bits; values are below 4.
_ROUNDING = 2**-6
_SMALL = trees.Case(
  lengths=(150,),
  num_tokens=16,
  num_kv_heads=1,
  capacity=256,
  head_dim=64,
  dtype='bfloat16',
)
CASES = {
  'a whole tile': (_SMALL, 1),
  'an empty cache': (dataclasses.replace(_SMALL, lengths=(0,)), 1),
  'a tile with padding': (dataclasses.replace(_SMALL, num_tokens=5), 1),
  'two words': (
    dataclasses.replace(_SMALL, num_tokens=64, num_heads=1, lengths=(100,)),
    1,
  ),
  'more blocks than the ring holds': (
    dataclasses.replace(_SMALL, lengths=(600,), capacity=640),
    1,
  ),
  'ragged rows, tiles and parts': (
    dataclasses.replace(
      _SMALL,
      lengths=(0, 300),
      num_tokens=20,
      num_heads=8,
      num_kv_heads=2,
      capacity=448,
    ),
    3,
  ),
}


def _strict() -> Any:
  parameters: Any = plgpu
  return parameters.InterpretGPUParams(detect_races=True)


@pytest.fixture
def matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
  """Stands in for the matrix unit, which the interpreter does not have.

  Accumulators become shared memory, and a product is made at once.
  """
  run_scoped = pl.run_scoped

  def multiply(accumulator: Any, left: Any, right: Any) -> None:
    left = left if isinstance(left, jax.Array) else left[...]
    accumulator[...] += jax.lax.dot(
      left, right[...], preferred_element_type=jnp.float32
    )

  class Accumulator:
    def __new__(cls, shape: tuple[int, ...], dtype: Any) -> Any:
      return plgpu.SMEM(shape, dtype)

    @staticmethod
    def init(value: Array) -> Array:
      return value

  def start_at(value: Array, body: Callable[[Any], Any]) -> Any:
    def run(ref: Any) -> Any:
      ref[...] = value
      result = body(ref)
      return ref[...] if result is None else result

    return run_scoped(run, plgpu.SMEM(value.shape, value.dtype))

  def scoped(body: Callable[..., Any], *types: Any, **options: Any) -> Any:
    if body.__name__ != 'score':
      return run_scoped(body, *types, **options)
    shape = (pallas_gpu.ROWS, pallas_gpu.BLOCK)
    return start_at(jnp.zeros(shape, jnp.float32), body)

  monkeypatch.setattr(plgpu, 'wgmma', multiply)
  monkeypatch.setattr(plgpu, 'WGMMAAccumulatorRef', Accumulator)
  monkeypatch.setattr(pl, 'run_scoped', scoped)
  monkeypatch.setattr(
    pl, 'run_state', lambda body: lambda value: start_at(value, body)
  )


@pytest.mark.usefixtures('matrix_unit')
@pytest.mark.parametrize('name', CASES)
def test_tree_attention_matches_the_reference(
  name: str, capfd: pytest.CaptureFixture[str]
) -> None:
  case, num_parts = CASES[name]
  arrays = trees.inputs(case)
  out = pallas_gpu.attend(*arrays, num_parts=num_parts, interpret=_strict())
  expected = reference.attend(*arrays)
  np.testing.assert_allclose(
    np.asarray(out, np.float32),
    np.asarray(expected, np.float32),
    rtol=0,
    atol=_ROUNDING,
  )
  assert 'RACE' not in capfd.readouterr().out


def _keys(num_rows: int) -> Array:
  return jax.random.key_data(jax.random.split(jax.random.key(1), num_rows))


@pytest.mark.parametrize(
  ('num_rows', 'vocab_size', 'temperature', 'dtype'),
  [
    (3, 2500, 0.7, 'float32'),
    (2, 1024, 1.0, 'bfloat16'),
    (1, 1025, 0.0, 'float32'),
  ],
)
def test_sampling_draws_what_jax_random_draws(
  num_rows: int, vocab_size: int, temperature: float, dtype: str
) -> None:
  logits_RV = 3 * jax.random.normal(jax.random.key(0), (num_rows, vocab_size))
  arrays = (logits_RV.astype(dtype), _keys(num_rows))
  ours_R = sampling.sample_tokens(
    *arrays, temperature=temperature, interpret=_strict()
  )
  theirs_R = sampling_reference.sample_tokens(*arrays, temperature=temperature)
  assert ours_R.tolist() == theirs_R.tolist()


def test_rejection_sampling_matches_the_reference() -> None:
  keys = jax.random.split(jax.random.key(0), 4)
  shape = (8, 2, 2100)
  target = 2 * jax.random.normal(keys[0], (8, 3, 2100))
  draft = target[:, :-1] + 0.2 * jax.random.normal(keys[1], shape)
  tokens = jax.random.categorical(keys[2], draft)
  draft = draft.at[1, 0, 7].set(jnp.nan).at[2, 0].set(-jnp.inf)
  tokens = tokens.at[3, 0].set(-1).at[4, 1].set(2100)
  coins = jax.random.uniform(keys[3], (8, 2)).at[:5].set(0.0).at[5].set(0.999)
  arrays = (target, draft, tokens, coins, _keys(8))
  ours = pallas_gpu_chain.reject_chain(*arrays, interpret=_strict())
  theirs = sampling_reference.reject_chain(*arrays)
  assert [x.tolist() for x in ours] == [x.tolist() for x in theirs]
  assert len(set(ours[0].tolist())) == 3
