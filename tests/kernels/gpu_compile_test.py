"""The GPU kernels compile for a Hopper GPU, which takes none."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm.kernels.speculative_sampling import (
  pallas_gpu as sampling_gpu,
)
from efficient_llm.kernels.speculative_sampling import pallas_gpu_chain
from efficient_llm.kernels.tree_attention import pallas_gpu as attention_gpu
from efficient_llm.training import topology
from tests.kernels import whole_round

pytestmark = pytest.mark.skipif(
  not any(
    importlib.util.find_spec(f'jax_cuda{major}_plugin') for major in (12, 13)
  ),
  reason='the CUDA compiler (a jax plug-in) is not installed',
)


def _compile(function: Callable[..., Any], *shapes: Any) -> str:
  """The compiled program of a function of (shape, dtype) pairs."""
  device = topology.load(topology.parse('h100:1')).devices[0]
  mesh = jax.sharding.Mesh(
    np.array([device]), ('one',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  arguments = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
    for shape, dtype in shapes
  ]
  with jax.set_mesh(mesh):
    traced = jax.jit(function).trace(*arguments)
    lowered = traced.lower(lowering_platforms=('cuda',))
  return lowered.compile().as_text() or ''


@pytest.mark.parametrize(
  ('batch_size', 'num_tokens', 'num_heads', 'head_dim', 'dtype'),
  [
    (1, 16, 32, 128, 'bfloat16'),
    (8, 64, 32, 128, 'bfloat16'),
    (2, 17, 8, 64, 'float16'),
    (32, 1, 64, 128, 'bfloat16'),
  ],
)
def test_tree_attention_compiles(
  batch_size: int, num_tokens: int, num_heads: int, head_dim: int, dtype: str
) -> None:
  cache = ((batch_size, 8, 32_768, head_dim), dtype)
  program = _compile(
    attention_gpu.attend,
    ((batch_size, num_tokens, num_heads, head_dim), dtype),
    cache,
    cache,
    ((batch_size,), 'int32'),
    ((batch_size, num_tokens, -(-num_tokens // 32)), 'uint32'),
  )
  assert 'mosaic_gpu' in program


@pytest.mark.parametrize('temperature', [0.0, 0.7])
@pytest.mark.parametrize(
  ('num_rows', 'dtype'), [(1, 'float32'), (17, 'float32'), (32, 'bfloat16')]
)
def test_sampling_compiles(
  num_rows: int, dtype: str, temperature: float
) -> None:
  sample = functools.partial(
    sampling_gpu.sample_tokens, temperature=temperature
  )
  program = _compile(
    sample, ((num_rows, 50_257), dtype), ((num_rows, 2), 'uint32')
  )
  assert 'mosaic_gpu' in program


@pytest.mark.parametrize(
  ('num_drafts', 'dtype'), [(1, 'float32'), (8, 'bfloat16')]
)
def test_rejection_sampling_compiles(num_drafts: int, dtype: str) -> None:
  program = _compile(
    pallas_gpu_chain.reject_chain,
    ((4, num_drafts + 1, 50_257), dtype),
    ((4, num_drafts, 50_257), dtype),
    ((4, num_drafts), 'int32'),
    ((4, num_drafts), 'float32'),
    ((4, 2), 'uint32'),
  )
  assert 'mosaic_gpu' in program


def test_a_round_of_speculation_compiles_with_its_kernel() -> None:
  device = topology.load(topology.parse('h100:1')).devices[0]
  program = whole_round.compiled(device, 'cuda', 'pallas_gpu')
  # One for every layer of the target, and the drafter's.
  assert program.count('mosaic_gpu') > whole_round.NUM_LAYERS
