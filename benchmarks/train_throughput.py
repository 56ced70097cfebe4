"""Training speed against PyTorch: same model, same batches, same threads.

    ./run.sh python -m benchmarks.train_throughput [--quick]

Every arm lives in a process of its own and they take turns, so that noise hits
all alike; a turn begins with two steps that do not count. The peer is PyTorch's
faster arm, eager or `torch.compile`; compile time counts for nobody. PyTorch is
the extra [torch].
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import harness
from efficient_llm import optimizer, sharding
from efficient_llm.data import pipeline
from efficient_llm.models import presets, transformer
from efficient_llm.training import hardware, loop, pretrain

_SIZES = {
  'ladder_1m': (16, 128),
  'ladder_5m': (8, 256),
  'ladder_30m': (4, 256),
}
_ARMS = ('jax', 'torch_eager', 'torch_compile')
_NUM_BATCHES = 4


def make_config(size: str) -> pretrain.PretrainConfig:
  """The run both sides train."""
  batch_size, sequence_length = _SIZES[size]
  return pretrain.PretrainConfig(
    model=presets.get(size),
    data=pipeline.DataConfig(
      batch_size=batch_size, sequence_length=sequence_length
    ),
    optimizer=optimizer.OptimizerConfig(learning_rate=1e-3, warmup_steps=10),
    loop=loop.LoopConfig(num_steps=1000),
  )


def jax_arm(config: pretrain.PretrainConfig) -> Callable[[Any], float]:
  """This project's train step on one device."""
  program = pretrain.build(config, sharding.make_mesh(config.mesh))
  state = program.init_state()

  def step(batch: Any) -> float:
    nonlocal state
    with jax.set_mesh(program.mesh):
      placed = sharding.to_global(batch, program.batch_sharding)
      state, metrics = program.train_step(state, placed)
      return float(metrics['loss'])

  return step


def torch_arm(
  config: pretrain.PretrainConfig, *, compiled: bool
) -> Callable[[Any], float]:
  """The same step in PyTorch."""
  import torch

  from benchmarks import torch_transformer

  torch.set_num_threads(os.cpu_count() or 1)
  trainer = torch_transformer.Trainer(
    config.model,
    learning_rate=config.optimizer.learning_rate,
    num_steps=config.loop.num_steps,
    compiled=compiled,
  )
  return trainer.step


def serve(arm: str, size: str, cache_dir: str) -> None:
  """Worker: compiles, then runs as many steps as each input line says."""
  config = make_config(size)
  dataset = pipeline.open_dataset(config.data, cache_dir=cache_dir)
  source = dataset.iterate()
  batches = [dict(next(source)) for _ in range(_NUM_BATCHES)]
  if arm == 'jax':
    step = jax_arm(config)
  else:
    step = torch_arm(config, compiled=arm == 'torch_compile')
  first = step(batches[0])
  step(batches[1])
  reply({'first_loss': first})
  for line in sys.stdin:
    num_steps = int(line)
    # Memory given back while the others ran comes back page by page, and a
    # virtual machine's host is slow at that: no part of a steady run.
    for batch in batches[:2]:
      step(batch)
    start = time.perf_counter()
    for index in range(num_steps):
      loss = step(batches[index % _NUM_BATCHES])
    reply({'secs': (time.perf_counter() - start) / num_steps, 'loss': loss})


def reply(message: dict[str, float]) -> None:
  """One line for the parent."""
  print(json.dumps(message), flush=True)


@dataclasses.dataclass
class Worker:
  """An arm's process, which rests until asked."""

  arm: str
  size: str
  cache_dir: str

  def start(self) -> 'Worker':
    """Starts it and waits until everything is compiled."""
    command = [sys.executable, '-m', 'benchmarks.train_throughput']
    command += [f'--worker={self.arm}', f'--size={self.size}']
    command += [f'--cache_dir={self.cache_dir}']
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    self.first_loss = self._read()['first_loss']
    return self

  def run(self, num_steps: int) -> float:
    """Seconds a step, over this many."""
    assert self.process.stdin is not None
    self.process.stdin.write(f'{num_steps}\n')
    self.process.stdin.flush()
    return self._read()['secs']

  def stop(self) -> None:
    """Closes its input, which ends it."""
    assert self.process.stdin is not None
    self.process.stdin.close()
    self.process.wait()

  def _read(self) -> dict[str, float]:
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f'The {self.arm} arm died; see its output above.')
    return json.loads(line)


def measure(size: str, *, rounds: int, cache_dir: str) -> dict[str, Any]:
  """Takes turns between the arms of one model size."""
  workers = [Worker(arm, size, cache_dir).start() for arm in _ARMS]
  config = make_config(size)
  tokens = config.data.batch_size * config.data.sequence_length
  num_steps = 4
  secs: dict[str, list[float]] = {arm: [] for arm in _ARMS}
  for round_index in range(rounds):
    for worker in workers[:: 1 if round_index % 2 == 0 else -1]:
      # An OpenMP team of the arm before may still be spinning.
      time.sleep(0.3)
      secs[worker.arm].append(worker.run(num_steps))
  for worker in workers:
    worker.stop()
  medians = {arm: statistics.median(values) for arm, values in secs.items()}
  peer = min(('torch_eager', 'torch_compile'), key=medians.__getitem__)
  flops = transformer.flops_per_token(
    config.model, num_tokens=config.data.sequence_length
  )
  ratios = [p / j for p, j in zip(secs[peer], secs['jax'], strict=True)]
  return {
    'size': size,
    'num_params': transformer.num_params(config.model),
    'batch_size': config.data.batch_size,
    'sequence_length': config.data.sequence_length,
    'tokens_per_sec': {arm: tokens / s for arm, s in medians.items()},
    'fraction_of_peak': {
      arm: flops * tokens / s / hardware.measured_peak_flops()
      for arm, s in medians.items()
    },
    'peer': peer,
    'ratio': medians[peer] / medians['jax'],
    'ratio_by_round': ratios,
    'first_loss': {w.arm: w.first_loss for w in workers},
  }


def main() -> None:
  """Measures all sizes, or serves as one arm."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='one size, 3 rounds')
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--worker', choices=_ARMS, help=argparse.SUPPRESS)
  parser.add_argument('--size', choices=_SIZES, help='only this one')
  parser.add_argument('--cache_dir', default='out/cache')
  arguments = parser.parse_args()
  if arguments.worker:
    serve(arguments.worker, arguments.size, arguments.cache_dir)
    return
  if importlib.util.find_spec('torch') is None:
    print(
      "error: the peer is PyTorch, which is not installed; run './run.sh pip "
      "install torch==2.13.0' first.",
      file=sys.stderr,
    )
    sys.exit(2)
  pathlib.Path(arguments.cache_dir).mkdir(parents=True, exist_ok=True)
  sizes = [arguments.size] if arguments.size else list(_SIZES)
  if arguments.quick:
    sizes = sizes[:1]
  rows = []
  for size in sizes:
    row = measure(
      size,
      rounds=3 if arguments.quick else arguments.rounds,
      cache_dir=arguments.cache_dir,
    )
    print(f'{size}: {row["ratio"]:.2f} x {row["peer"]}', file=sys.stderr)
    rows.append(row)
  ratios = [row['ratio'] for row in rows]
  import torch

  harness.record(
    'train_throughput',
    {
      'ratio_min': min(ratios),
      'ratio_median': statistics.median(ratios),
      'threads': os.cpu_count(),
      'torch': torch.__version__,
      'rows': rows,
    },
  )


if __name__ == '__main__':
  main()
