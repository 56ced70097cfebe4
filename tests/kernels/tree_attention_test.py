"""Tree attention: both implementations against attention written plainly."""

from collections.abc import Callable

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm.kernels.tree_attention import api, pallas_tpu, reference
from efficient_llm.typing import Array
from tests.kernels import interpreter, trees

no_race = interpreter.no_race
ALL = pytest.mark.parametrize('name', trees.CASES)
_BLOCK = 128
# Sums of a few hundred terms of size 1: float32 rounds them at 1e-6; bfloat16
# keeps 8 bits of each weight and of the result, which is below 4.
_ROUNDING = {'float32': 3e-6, 'bfloat16': 2**-6}
_SMALL = trees.Case(lengths=(20, 9), num_tokens=9, capacity=40)


def _tpu(*arrays: Array, block: int = _BLOCK) -> Array:
  block = min(block, arrays[1].shape[2])
  return pallas_tpu.attend(*arrays, block=block, interpret=interpreter.STRICT)


@ALL
def test_the_reference_is_attention_to_the_cache_and_the_ancestors(
  name: str,
) -> None:
  case = trees.CASES[name]
  arrays = trees.inputs(case)
  out = np.asarray(reference.attend(*arrays), np.float64)
  np.testing.assert_allclose(
    out, trees.attend(*arrays), rtol=0, atol=_ROUNDING[case.dtype]
  )


@pytest.mark.usefixtures('no_race')
@ALL
def test_the_tpu_kernel_matches_the_reference(name: str) -> None:
  case = trees.CASES[name]
  arrays = trees.inputs(case)
  out, expected = _tpu(*arrays), reference.attend(*arrays)
  assert out.dtype == expected.dtype
  np.testing.assert_allclose(
    np.asarray(out, np.float32),
    np.asarray(expected, np.float32),
    rtol=0,
    atol=_ROUNDING[case.dtype],
  )


@pytest.mark.usefixtures('no_race')
@pytest.mark.parametrize('attend', [reference.attend, _tpu])
def test_an_ancestor_bit_changes_its_own_query_and_no_other(
  attend: Callable[..., Array],
) -> None:
  *arrays, masks = trees.inputs(_SMALL)
  flipped = masks.at[1, 7, 0].set(masks[1, 7, 0] ^ 1)
  before = np.asarray(attend(*arrays, masks))
  after = np.asarray(attend(*arrays, flipped))
  changed = (before != after).any((2, 3))
  assert np.argwhere(changed).tolist() == [[1, 7]]


@pytest.mark.usefixtures('no_race')
@pytest.mark.parametrize('attend', [reference.attend, _tpu])
def test_a_query_that_sees_nothing_gets_zeros(
  attend: Callable[..., Array],
) -> None:
  *arrays, lengths, masks = trees.inputs(_SMALL)
  lengths, masks = lengths.at[0].set(0), masks.at[0, 3].set(0)
  out = np.asarray(attend(*arrays, lengths, masks))
  assert (out[0, 3] == 0).all()
  assert np.isfinite(out[0, 4]).all()
  assert (out[0, 4] != 0).all()


@pytest.mark.usefixtures('no_race')
def test_the_size_of_a_block_changes_only_the_rounding() -> None:
  arrays = trees.inputs(trees.Case(lengths=(250, 3), num_tokens=9))
  one, many = (np.asarray(_tpu(*arrays, block=b)) for b in (300, 64))
  np.testing.assert_allclose(one, many, rtol=0, atol=_ROUNDING['float32'])


@hypothesis.given(
  step=st.integers(0, 100),
  length=st.integers(0, 5000),
  num_tokens=st.integers(1, 64),
  block=st.sampled_from((64, 128, 1024)),
)
def test_no_block_behind_the_tail_is_read(
  step: int, length: int, num_tokens: int, block: int
) -> None:
  live = int(
    pallas_tpu.live_block(
      jnp.int32(step), jnp.int32(length), num_tokens=num_tokens, block=block
    )
  )
  assert live * block < length + num_tokens
  # And every block before it is the step's own.
  assert live == step or (live + 1) * block >= length + num_tokens


@hypothesis.given(
  num_rows=st.integers(1, 2048), capacity=st.integers(64, 40_000)
)
def test_a_block_is_whole_lanes_or_the_whole_cache(
  num_rows: int, capacity: int
) -> None:
  block = pallas_tpu.block_size(num_rows, capacity)
  assert block == capacity or block % 128 == 0
  assert 0 < block <= capacity


def test_xla_serves_this_machine_when_nothing_is_asked_for() -> None:
  arrays = trees.inputs(_SMALL)
  assert (api.attend(*arrays) == reference.attend(*arrays)).all()


def _shapes(
  num_tokens: int, num_heads: int, dtype: str
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  q = jax.ShapeDtypeStruct((1, num_tokens, num_heads, 128), dtype)
  return q, jax.ShapeDtypeStruct((1, 1, 32_768, 128), dtype)


@pytest.mark.parametrize(
  ('device', 'num_heads', 'dtype', 'implementation', 'word'),
  [
    (('cpu', 'cpu'), 4, 'bfloat16', 'xla', 'cpu'),
    (('tpu', 'TPU v5 lite'), 4, 'bfloat16', 'pallas_tpu', 'tpu'),
    (('tpu', 'TPU v5 lite'), 4, 'float16', 'xla', 'float16'),
    (('tpu', 'TPU v5 lite'), 128, 'float32', 'xla', 'MiB'),
    (('gpu', 'NVIDIA H200'), 4, 'bfloat16', 'pallas_gpu', 'gpu'),
    (('gpu', 'NVIDIA GH200 480GB'), 4, 'bfloat16', 'pallas_gpu', 'gpu'),
    (('gpu', 'NVIDIA H100 80GB HBM3'), 4, 'float32', 'xla', 'float32'),
    (('gpu', 'NVIDIA A100-SXM4-80GB'), 4, 'bfloat16', 'xla', 'A100'),
  ],
)
def test_the_choice_says_why(
  device: tuple[str, str],
  num_heads: int,
  dtype: str,
  implementation: str,
  word: str,
) -> None:
  platform, kind = device
  shapes = _shapes(64, num_heads, dtype)
  choice = api.choose(*shapes, platform=platform, device_kind=kind)
  assert choice.implementation == implementation
  assert word in choice.reason


@pytest.mark.parametrize(
  ('capacity', 'head_dim', 'word'), [(1000, 128, '1000'), (1024, 96, '96')]
)
def test_a_cache_that_the_gpu_kernel_cannot_take_is_left_to_xla(
  capacity: int, head_dim: int, word: str
) -> None:
  q = jax.ShapeDtypeStruct((1, 16, 8, head_dim), 'bfloat16')
  keys = jax.ShapeDtypeStruct((1, 2, capacity, head_dim), 'bfloat16')
  choice = api.choose(q, keys, platform='gpu', device_kind='NVIDIA H200')
  assert choice.implementation == 'xla'
  assert word in choice.reason


@pytest.mark.parametrize(
  ('change', 'remedy'),
  [
    ({'num_tokens': 65, 'capacity': 80}, 'verify fewer nodes'),
    ({'num_tokens': 33, 'num_words': 1}, 'pack ceil'),
    ({'num_tokens': 5, 'capacity': 4, 'lengths': (0,)}, 'enlarge it'),
    ({'num_heads': 3}, 'multiple of num_kv_heads=2'),
  ],
)
def test_shapes_that_do_not_fit_are_refused(
  change: dict[str, int], remedy: str
) -> None:
  arguments = {'lengths': (1,), 'num_tokens': 2, 'capacity': 64} | change
  case = trees.Case(**{**arguments, 'num_words': 3})
  *rest, masks = trees.inputs(case)
  arrays = tuple([*rest, masks[:, :, : change.get('num_words', 3)]])
  with pytest.raises(ValueError, match=remedy) as raised:
    api.attend(*arrays)
  assert '\n' not in str(raised.value)


def test_a_kernel_that_cannot_take_the_shapes_is_refused() -> None:
  arrays = trees.inputs(trees.Case(lengths=(1,), num_tokens=2, dtype='float16'))
  with pytest.raises(ValueError, match='not float16; leave it None to'):
    api.attend(*arrays, implementation='pallas_tpu')
