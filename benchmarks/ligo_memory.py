"""Memory of learning a growth operator against training, compiled for a TPU.

    python -m benchmarks.ligo_memory [--topology=v5e:2x2] [--level=O1]

Needs libtpu, but no TPU: programs are compiled ahead of time and not run. For
pairs of the LiGO paper at full size, in MiB on each chip, inputs and
temporaries together: a train step of the large model; a step of the operator
with every layer made inside the scan; and the same with all layers made at
once, as it would be without. The compiler's full effort (`--level=O2`) takes
several times as long for nearly the same memory.
"""

import argparse
import contextlib
import functools
import sys
import time
import unittest.mock
from collections.abc import Callable
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

# Small and large model, tokens of a sequence or pixels along an image's side,
# and how many of them a batch has.
_PAIRS = {
  'bert': ('bert_base', 'bert_large', 128, 64),
  'gpt2': ('gpt2', 'gpt2_medium', 1024, 16),
  'deit': ('deit_small', 'deit_base', 224, 64),
  'cait': ('cait_xs24', 'cait_s24', 224, 64),
}
PAIRS = tuple(_PAIRS)
_MIB = 2**20


def programs(
  where: topology.Topology, pair: str
) -> dict[str, Callable[[], float]]:
  """Each compiles a program and gives its MiB a chip.

  Args:
    where: What is compiled for.
    pair: One of `PAIRS`.
  """
  small_name, large_name, length, batch_size = _PAIRS[pair]
  small = presets.get(small_name)
  large = presets.get(large_name, remat='full', dtype='bfloat16')
  if large.reads_images:
    settings = {'objective': 'classes', 'image_size': length}
  else:
    objective = 'causal' if large.causal else 'masked'
    settings = {'objective': objective, 'sequence_length': length}
  data = pipeline.DataConfig(batch_size=batch_size, **settings)
  mesh = sharding.make_mesh(sharding.MeshConfig(), devices=list(where.devices))
  program = pretrain.build(
    pretrain.PretrainConfig(model=large, data=data), mesh
  )
  shapes = transformer.abstract_params(small)
  placed = sharding.param_shardings(
    mesh, transformer.logical_axes(small), shapes
  )

  def train() -> float:
    memory = ahead_of_time.compile_step(program, where, fast=False).memory
    assert memory.arguments is not None
    assert memory.temporaries is not None
    return (memory.arguments + memory.temporaries) / _MIB

  def at_once(
    config: Any, params: Any, operator: Any, *, num_layers: int
  ) -> Any:
    del num_layers
    return operator_lib.grow(config, params, operator)

  def learn(patched: Any) -> float:
    begin = methods.build(methods.get('ligo_released'), small, large)
    built = learning.build(
      LearnConfig(num_steps=100), small, large, begin, mesh
    )
    step: Any = built.learn_step
    arguments = (
      built.abstract_state,
      program.abstract_batch,
      state_lib.abstract(shapes, placed),
    )
    with jax.set_mesh(mesh):
      with patched:
        traced = step.trace(*arguments)
      lowered = traced.lower(lowering_platforms=(where.platform,))
      memory = lowered.compile().memory_analysis()
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / _MIB

  return {
    'train_mib': train,
    'learn_mib': functools.partial(learn, contextlib.nullcontext()),
    'learn_at_once_mib': functools.partial(
      learn, unittest.mock.patch.object(layerwise, 'grow', at_once)
    ),
  }


def main() -> None:
  """Measures all pairs."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--topology', default='v5e:2x2')
  parser.add_argument('--level', default='O1', choices=('O0', 'O1', 'O2', 'O3'))
  arguments = parser.parse_args()
  try:
    where = topology.load(topology.parse(arguments.topology))
  except ValueError as error:
    parser.error(str(error))
  jax.config.update('jax_optimization_level', arguments.level)
  found: dict[str, dict[str, float]] = {}
  for pair in PAIRS:
    found[pair] = {}
    for name, compiled in programs(where, pair).items():
      start = time.perf_counter()
      found[pair][name] = compiled()
      secs = time.perf_counter() - start
      print(
        f'{pair} {name}: {found[pair][name]:.0f}, compiled in {secs:.0f} s',
        file=sys.stderr,
        flush=True,
      )
  ratios = [x['learn_mib'] / x['train_mib'] for x in found.values()]
  harness.record(
    'ligo_memory',
    {
      'topology': where.name,
      'optimization_level': arguments.level,
      'pairs': found,
      'max_learn_by_train': max(ratios),
    },
  )


if __name__ == '__main__':
  main()
