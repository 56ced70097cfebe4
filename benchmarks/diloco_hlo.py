"""What crosses islands, read from the compiled programs.

    ./run.sh python -m benchmarks.diloco_hlo [--quick] [--size=PRESET]

Compiles the inner step and the outer step of every fragment for two and four
islands: on simulated CPU devices, and on TPU slices where libtpu is installed.
Nothing runs. For each case, in bytes that leave one island:
  inner_cross_island_bytes   a step's; must be 0
  outer_cross_island_bytes   a round's, of all fragments
  expected_bytes             the encoded update to each other island, once, and
                             one count of tokens from each device
  excess                     how much more crosses: norms and verdicts of a few
                             bytes, and tables too small to be parted among an
                             island's devices, which send them alike
At the top level is the largest of all cases.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import harness
from efficient_llm import sharding
from efficient_llm.data import pipeline
from efficient_llm.diloco import compression, fragments, mesh
from efficient_llm.diloco.config import DilocoConfig
from efficient_llm.models import presets
from efficient_llm.training import collectives, hlo, topology

_NUM_SIMULATED = 8
# Bytes of the count of tokens that comes with an update.
_COUNT_BYTES = 4


def config(
  size: str, *, islands: int, format: compression.Format
) -> DilocoConfig:
  """A streaming run: two fragments, compressed alike.

  Args:
    size: Preset of the model.
    islands: How many.
    format: Of what they send.
  """
  return DilocoConfig(
    model=presets.get(size),
    data=pipeline.DataConfig(sequence_length=128, batch_size=8),
    mesh=sharding.MeshConfig(island=islands, fsdp=-1),
    islands=islands,
    fragments=fragments.FragmentConfig(2),
    compression=compression.CompressionConfig(format),
  )


def measure(run: DilocoConfig, devices: Sequence[Any]) -> dict[str, Any]:
  """Bytes that leave an island, by program.

  Args:
    run: A group of devices each island.
    devices: Real, simulated or compile-only ones.
  """
  layout = sharding.make_mesh(run.mesh, devices=devices)
  program = mesh.build(run, layout)
  state = program.abstract_state(run.islands)
  reached = jax.ShapeDtypeStruct((run.islands,), bool)
  arguments = (
    state.step,
    state.islands,
    state.tokens_PM,
    dict(program.abstract_batch),
  )
  with jax.set_mesh(layout):
    inner = program.inner_step.lower(*arguments).compile()
    outer = [
      program.outer_step.program('send', p).lower(state, reached).compile()
      for p in range(run.fragments.count)
    ]
    outer += [
      program.outer_step.program('apply', p).lower(state).compile()
      for p in range(run.fragments.count)
    ]
  group = layout.size // run.islands
  inner_kinds = _crossing(inner.as_text(), layout)
  outer_kinds = [x for p in outer for x in _crossing(p.as_text(), layout)]
  others = run.islands - 1
  outer_bytes = group * sum(sent for _, sent in outer_kinds)
  counts = len(program.sent_bytes) * group * _COUNT_BYTES
  expected = others * (sum(program.sent_bytes) + counts)
  return {
    'islands': run.islands,
    'devices_per_island': group,
    'format': run.compression.format,
    'inner_cross_island_bytes': group * sum(sent for _, sent in inner_kinds),
    'outer_cross_island_bytes': outer_bytes,
    'expected_bytes': expected,
    'excess': outer_bytes / expected - 1,
    'sent_bytes': sum(program.sent_bytes),
    'outer_collectives': outer_kinds,
  }


def _crossing(text: str, layout: jax.sharding.Mesh) -> list[list[Any]]:
  """Kind of what leaves an island, and bytes from each of its devices."""
  granules = [getattr(d, 'slice_index', 0) for d in layout.devices.flat]
  placed = collectives.Layout(dict(layout.shape), granules)
  return [
    [found.kind, found.bytes_per_device_per_step]
    for found in collectives.collect(hlo.parse(text), placed)
    if {'island', 'unknown'} & set(found.mesh_axes)
  ]


def main() -> None:
  """Compiles all cases."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='one CPU case')
  parser.add_argument('--size', default='ladder_5m', help='preset')
  arguments = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', _NUM_SIMULATED)
  local = jax.devices('cpu')
  cases: list[tuple[str, int, Any]] = [
    ('cpu:8', 2, local),
    ('cpu:8', 4, local),
    ('cpu:8', 8, local),
  ]
  if arguments.quick:
    cases = cases[:1]
  elif importlib.util.find_spec('libtpu') is not None:
    for name in ('v5e:2x2,slices=2', 'v5e:2x2,slices=4'):
      found = topology.load(topology.parse(name))
      cases.append((name, len(set(found.granules)), found.devices))
  rows = []
  for name, islands, devices in cases:
    formats: tuple[compression.Format, ...] = ('float32', 'int4')
    if arguments.quick:
      formats = ('int4',)
    for format in formats:
      run = config(arguments.size, islands=islands, format=format)
      row = {'topology': name, **measure(run, devices)}
      rows.append(row)
      print(row, file=sys.stderr, flush=True)
  harness.record(
    'diloco_hlo',
    {
      'size': arguments.size,
      'inner_cross_island_bytes': max(
        row['inner_cross_island_bytes'] for row in rows
      ),
      'outer_cross_island_bytes': max(
        row['outer_cross_island_bytes'] for row in rows
      ),
      'expected_bytes': max(row['expected_bytes'] for row in rows),
      'excess': max(row['excess'] for row in rows),
      'rows': rows,
    },
  )


if __name__ == '__main__':
  main()
