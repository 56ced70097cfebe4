"""What a round costs by itself: two islands and a hub over loopback.

    ./run.sh python -m benchmarks.wan_overhead [--quick]

The hub, Flower's programs, TLS and keys, messages and encoding (int8, with
error feedback, both ways) are real, the islands' steps only sleep
(benchmarks.wan_stand_in). A round trip goes from an island's handing over its
update to the hub's answer, merged: Flower's way there, the hub's checks, the
outer step, the encoding of the move, and the way back. Both islands and the hub
share the machine. Then the seconds of encoding an update by itself, compiled
and as separate operations; the first time includes compilation.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import harness, wan_runs
from efficient_llm.diloco import compression
from efficient_llm.diloco.wan import fragment_codec
from efficient_llm.models import transformer
from experiments import flower_programs

# Embedding sizes of models of 12.5 M and 100 M float32 parameters.
_SIZES = {'50_mb': 360, '400_mb': 1024}
_ISLANDS = ('a', 'b')
_ROUNDS, _STEPS = 5, 50
_PATIENCE_SECS = 900.0


def _round_trips(embed_dim: int, workdir: pathlib.Path) -> dict[str, Any]:
  """Runs a hub and two islands, and reads what the hub knows of them."""
  from efficient_llm.diloco.wan import keys

  folder = workdir / 'keys'
  keys.make(folder, hosts=[], islands=_ISLANDS)
  port = flower_programs.free_port()
  shared = [
    '--config=benchmarks/wan_runs.py:blocking_int8',
    f'--config.model.embed_dim={embed_dim}',
    f'--config.islands={len(_ISLANDS)}',
    f'--config.sync_period={_STEPS}',
    f'--config.loop.num_steps={_ROUNDS * _STEPS}',
  ]
  hub = _start(
    workdir / 'hub',
    'experiments.island_hub',
    *shared,
    f'--keys={folder}',
    '--listen=127.0.0.1',
    f'--port={port}',
    '--page=',
  )
  islands = [
    _start(
      workdir / name,
      'benchmarks.wan_stand_in',
      *shared,
      f'--hub=127.0.0.1:{port}',
      f'--key={folder / "islands" / name}.key',
      f'--seed={i}',
      '--step_secs=0.05',
    )
    for i, name in enumerate(_ISLANDS)
  ]
  try:
    if hub.wait(_PATIENCE_SECS):
      raise RuntimeError((workdir / 'hub' / 'log.txt').read_text()[-2000:])
  finally:
    for process in (*islands, hub):
      flower_programs.stop(process)
  status = json.loads((workdir / 'hub' / 'status.json').read_text())
  secs = []
  for island in status['islands']:
    trips = [end - at for kind, at, end in island['spans'] if kind == 'sending']
    # In the first round programs are compiled.
    secs += trips[1:]
  sent = [x['bytes_up'] / _ROUNDS for x in status['islands']]
  return {
    'round_trip_secs': statistics.median(secs),
    'round_trips': secs,
    'message_bytes': statistics.mean(sent),
  }


def _start(
  workdir: pathlib.Path, module: str, *arguments: str
) -> subprocess.Popen[bytes]:
  workdir.mkdir()
  with (workdir / 'log.txt').open('wb') as log:
    return subprocess.Popen(
      [sys.executable, '-m', module, f'--workdir={workdir}', *arguments],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
    )


def _encoding(num_params: int, rounds: int) -> dict[str, float]:
  """Seconds of encoding an update with what is owed, first and later."""
  config = compression.CompressionConfig(format='int8')
  random = np.random.default_rng(0)
  delta = {'x': random.standard_normal((num_params // 1024, 1024), np.float32)}
  owed = {'x': np.zeros_like(delta['x'])}
  codec = fragment_codec.Codec(config, [fragment_codec.shapes_of(delta)])

  def eager() -> Any:
    with fragment_codec.on_cpu():
      return jax.device_get(compression.compress(delta, owed, config))

  arms = {'separate': eager, 'compiled': lambda: codec.compress(delta, owed)}
  first = {f'{name}_first_secs': _secs(arm) for name, arm in arms.items()}
  later = harness.alternate(arms, rounds)
  return first | {
    f'{name}_secs': statistics.median(secs) for name, secs in later.items()
  }


def _secs(work: Callable[[], Any]) -> float:
  start = time.perf_counter()
  work()
  return time.perf_counter() - start


def main() -> None:
  """Measures and records."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='50 MB only')
  quick = parser.parse_args().quick
  try:
    flower_programs.check_installed()
  except ValueError as error:
    print(f'skipped: {error}')
    return
  found: dict[str, Any] = {}
  for name, embed_dim in list(_SIZES.items())[: 1 if quick else None]:
    config = wan_runs.get_config('blocking_int8')
    fields = {**vars(config.model), 'embed_dim': embed_dim}
    num_params = transformer.num_params(transformer.TransformerConfig(**fields))
    with tempfile.TemporaryDirectory() as folder:
      trips = _round_trips(embed_dim, pathlib.Path(folder))
    found[name] = {
      'num_params': num_params,
      'parameter_bytes': 4 * num_params,
      **trips,
      'encoding': _encoding(num_params, 3),
    }
  harness.record(
    'wan_overhead_quick' if quick else 'wan_overhead',
    {'islands': len(_ISLANDS), 'rounds': _ROUNDS, 'seed': 0, **found},
  )


if __name__ == '__main__':
  main()
