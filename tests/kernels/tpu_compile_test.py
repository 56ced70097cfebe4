"""The TPU kernels compile for real chips, which takes no TPU."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm import sharding
from efficient_llm.kernels.speculative_sampling import (
  pallas_tpu as sampling_tpu,
)
from efficient_llm.kernels.speculative_sampling import pallas_tpu_chain
from efficient_llm.kernels.tree_attention import api
from efficient_llm.kernels.tree_attention import pallas_tpu as attention_tpu
from efficient_llm.training import topology
from tests.kernels import whole_round

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='the TPU compiler (libtpu) is not installed',
)
CHIPS = pytest.mark.parametrize('chip', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])


def _compile(chip: str, function: Callable[..., Any], *shapes: Any) -> str:
  """The compiled program of a function of (shape, dtype) pairs."""
  device = topology.load(topology.parse(chip)).devices[0]
  mesh = jax.sharding.Mesh(
    np.array([device]), ('one',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  arguments = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
    for shape, dtype in shapes
  ]
  with jax.set_mesh(mesh):
    lowered = (
      jax.jit(function).trace(*arguments).lower(lowering_platforms=('tpu',))
    )
  return lowered.compile().as_text() or ''


@CHIPS
@pytest.mark.parametrize(
  ('batch_size', 'num_tokens', 'num_heads', 'capacity', 'head_dim', 'dtype'),
  [
    (4, 16, 32, 32_768, 128, 'bfloat16'),
    (2, 64, 32, 5000, 128, 'float32'),
    (3, 17, 16, 777, 64, 'bfloat16'),
    (1, 1, 8, 200, 64, 'float32'),
  ],
)
def test_tree_attention_compiles(
  chip: str,
  batch_size: int,
  num_tokens: int,
  num_heads: int,
  capacity: int,
  head_dim: int,
  dtype: str,
) -> None:
  cache = ((batch_size, 8, capacity, head_dim), dtype)
  program = _compile(
    chip,
    attention_tpu.attend,
    ((batch_size, num_tokens, num_heads, head_dim), dtype),
    cache,
    cache,
    ((batch_size,), 'int32'),
    ((batch_size, num_tokens, -(-num_tokens // 32)), 'uint32'),
  )
  assert program.count('tpu_custom_call') >= 1


@CHIPS
@pytest.mark.parametrize('temperature', [0.0, 0.7])
@pytest.mark.parametrize(
  ('num_rows', 'dtype'), [(1, 'float32'), (17, 'float32'), (32, 'bfloat16')]
)
def test_sampling_compiles(
  chip: str, num_rows: int, dtype: str, temperature: float
) -> None:
  sample = functools.partial(
    sampling_tpu.sample_tokens, temperature=temperature
  )
  program = _compile(
    chip, sample, ((num_rows, 151_936), dtype), ((num_rows, 2), 'uint32')
  )
  assert program.count('tpu_custom_call') >= 1


@CHIPS
@pytest.mark.parametrize(
  ('num_drafts', 'dtype'), [(1, 'float32'), (8, 'float32'), (63, 'bfloat16')]
)
def test_rejection_sampling_compiles(
  chip: str, num_drafts: int, dtype: str
) -> None:
  program = _compile(
    chip,
    pallas_tpu_chain.reject_chain,
    ((4, num_drafts + 1, 50_257), dtype),
    ((4, num_drafts, 50_257), dtype),
    ((4, num_drafts), 'int32'),
    ((4, num_drafts), 'float32'),
    ((4, 2), 'uint32'),
  )
  assert program.count('tpu_custom_call') >= 3


def test_tree_attention_compiles_for_rows_and_heads_on_several_chips() -> None:
  devices = topology.load(topology.parse('v5e:2x2')).devices
  config = sharding.MeshConfig(fsdp=2, tensor=2)
  mesh = sharding.make_mesh(config, devices=devices)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = (
    ((4, 16, 8, 128), 'bfloat16'),
    ((4, 2, 4096, 128), 'bfloat16'),
    ((4, 2, 4096, 128), 'bfloat16'),
    ((4,), 'int32'),
    ((4, 16, 1), 'uint32'),
  )
  arguments = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
    for shape, dtype in shapes
  ]
  spec = sharding.divisible_spec(
    shapes[1][0], ('batch', 'kv_heads', None, None), mesh
  )
  attend = functools.partial(api.attend, implementation='pallas_tpu', spec=spec)
  with jax.set_mesh(mesh):
    traced = jax.jit(attend).trace(*arguments)
    lowered = traced.lower(lowering_platforms=('tpu',))
  program = lowered.compile().as_text() or ''
  # Half of the rows and one of the two key/value heads on each chip.
  calls = [x for x in program.splitlines() if 'tpu_custom_call' in x]
  assert len(calls) == 1
  assert 'bf16[2,1,64,128]' in calls[0]


@CHIPS
def test_a_round_of_speculation_compiles_with_its_kernel(chip: str) -> None:
  device = topology.load(topology.parse(chip)).devices[0]
  program = whole_round.compiled(device, 'tpu', 'pallas_tpu')
  # One for every layer of the target, and the drafter's.
  assert program.count('tpu_custom_call') > whole_round.NUM_LAYERS
