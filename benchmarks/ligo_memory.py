"""Memory of learning a growth operator against training, compiled for a TPU.

    python -m benchmarks.ligo_memory [--topology=v5e:2x2]

Needs libtpu, but no TPU: programs are compiled ahead of time and not run. For
BERT-Base to Large and GPT-2 to Medium, in MiB on each chip, inputs and
temporaries together: a train step of the large model; a step of the operator
with every layer made inside the scan; and the same with all layers made at
once, as it would be without.
"""

import argparse
import contextlib
import unittest.mock
from typing import Any

import jax

from benchmarks import harness
from efficient_llm import sharding
from efficient_llm.data import pipeline
from efficient_llm.ligo import layerwise, learning, methods
from efficient_llm.ligo import operator as operator_lib
from efficient_llm.ligo.config import LearnConfig
from efficient_llm.models import presets, transformer
from efficient_llm.training import ahead_of_time, pretrain, topology
from efficient_llm.training import state as state_lib

# Small and large model, tokens of a sequence, sequences of a batch.
_PAIRS = {
  'bert': ('bert_base', 'bert_large', 128, 64),
  'gpt2': ('gpt2', 'gpt2_medium', 1024, 16),
}
_MIB = 2**20


def measure(where: topology.Topology, pair: str) -> dict[str, float]:
  """MiB a chip of the three programs.

  Args:
    where: What is compiled for.
    pair: Name of the two models.
  """
  small_name, large_name, num_tokens, batch_size = _PAIRS[pair]
  small = presets.get(small_name)
  large = presets.get(large_name, remat='full', dtype='bfloat16')
  mesh = sharding.make_mesh(sharding.MeshConfig(), devices=list(where.devices))
  data = pipeline.DataConfig(
    sequence_length=num_tokens,
    batch_size=batch_size,
    objective='causal' if large.causal else 'masked',
  )
  program = pretrain.build(
    pretrain.PretrainConfig(model=large, data=data), mesh
  )
  begin = methods.build(methods.get('ligo_released'), small, large)
  shapes = transformer.abstract_params(small)
  placed = sharding.param_shardings(
    mesh, transformer.logical_axes(small), shapes
  )

  def learn_step(batch: Any) -> Any:
    built = learning.build(
      LearnConfig(num_steps=100), small, large, begin, mesh
    )
    step: Any = built.learn_step
    with jax.set_mesh(mesh):
      return step.trace(
        built.abstract_state, batch, state_lib.abstract(shapes, placed)
      )

  def at_once(
    config: Any, params: Any, operator: Any, *, num_layers: int
  ) -> Any:
    del num_layers
    return operator_lib.grow(config, params, operator)

  def compiled(patched: Any) -> float:
    with patched:
      traced = learn_step(program.abstract_batch)
    with jax.set_mesh(mesh):
      memory = (
        traced.lower(lowering_platforms=(where.platform,))
        .compile()
        .memory_analysis()
      )
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / _MIB

  trained = ahead_of_time.compile_step(program, where, fast=False).memory
  assert trained.arguments is not None
  assert trained.temporaries is not None
  train_bytes = trained.arguments + trained.temporaries
  return {
    'train_mib': train_bytes / _MIB,
    'learn_mib': compiled(contextlib.nullcontext()),
    'learn_at_once_mib': compiled(
      unittest.mock.patch.object(layerwise, 'grow', at_once)
    ),
  }


def main() -> None:
  """Measures both pairs."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--topology', default='v5e:2x2')
  arguments = parser.parse_args()
  try:
    where = topology.load(topology.parse(arguments.topology))
  except ValueError as error:
    parser.error(str(error))
  found = {}
  for pair in _PAIRS:
    found[pair] = measure(where, pair)
  ratios = [x['learn_mib'] / x['train_mib'] for x in found.values()]
  harness.record(
    'ligo_memory',
    {
      'topology': where.name,
      'pairs': found,
      'max_learn_by_train': max(ratios),
    },
  )


if __name__ == '__main__':
  main()
