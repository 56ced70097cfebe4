"""Model FLOPs utilisation of the train step on one accelerator.

    ./run.sh python -m benchmarks.train_mfu [--model=llama_350m] [--quick]

Synthetic tokens, bfloat16 activations, float32 master weights and AdamW. Useful
FLOPs only (nothing recomputed) over the published dense peak.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks import harness
from efficient_llm import optimizer, sharding
from efficient_llm.data import pipeline
from efficient_llm.models import presets, transformer
from efficient_llm.training import hardware, loop, pretrain

# Most wanted first; a case that does not fit in memory tries the next remat.
_CASES = (
  ('llama_350m', 2048, 16),
  ('llama_1b', 2048, 8),
  ('llama_350m', 4096, 8),
  ('llama_1b', 4096, 4),
)
_REMATS = ('none', 'dots', 'full')


def make_config(
  model: str, sequence_length: int, batch_size: int, remat: str
) -> pretrain.PretrainConfig:
  """The measured run."""
  return pretrain.PretrainConfig(
    model=presets.get(
      model, dtype='bfloat16', remat=remat, max_positions=sequence_length
    ),
    data=pipeline.DataConfig(
      batch_size=batch_size, sequence_length=sequence_length
    ),
    optimizer=optimizer.OptimizerConfig(warmup_steps=10),
    loop=loop.LoopConfig(num_steps=1000),
  )


def measure(
  config: pretrain.PretrainConfig, *, num_steps: int, packed: bool
) -> dict[str, Any]:
  """Steps per second with the queue kept full, and what limits they reach."""
  mesh = sharding.make_mesh(config.mesh)
  program = pretrain.build(config, mesh)
  shape = (config.data.batch_size, config.data.sequence_length)
  tokens = np.random.default_rng(0).integers(
    0, config.model.vocab_size, shape, dtype=np.int32
  )
  batch: dict[str, Any] = {
    'tokens': tokens,
    'targets': np.roll(tokens, -1, 1),
    'loss_weights': np.ones(shape, np.float32),
  }
  if packed:
    quarter = shape[1] // 4
    batch['segment_ids'] = np.broadcast_to(
      1 + np.arange(shape[1], dtype=np.int32) // quarter, shape
    )
    batch['positions'] = np.broadcast_to(
      np.arange(shape[1], dtype=np.int32) % quarter, shape
    )
  with jax.set_mesh(mesh):
    placed = sharding.to_global(batch, program.batch_sharding)
    state = program.init_state()
    start = time.perf_counter()
    state, metrics = program.train_step(state, placed)
    jax.block_until_ready(metrics)
    compile_secs = time.perf_counter() - start
    secs = []
    for _ in range(3):
      start = time.perf_counter()
      for _ in range(num_steps):
        state, metrics = program.train_step(state, placed)
      jax.block_until_ready(metrics)
      secs.append((time.perf_counter() - start) / num_steps)
  step_secs = statistics.median(secs)
  flops = transformer.flops_per_token(config.model, num_tokens=shape[1])
  rate = flops * shape[0] * shape[1] / step_secs
  device = mesh.devices.flat[0]
  memory = device.memory_stats() or {}
  return {
    'step_secs': step_secs,
    'spread': max(secs) / min(secs),
    'tokens_per_sec': shape[0] * shape[1] / step_secs,
    'model_tflops_per_sec': rate / 1e12,
    'mfu': hardware.mfu(rate, list(mesh.devices.flat)),
    'compile_secs': compile_secs,
    'peak_bytes': memory.get('peak_bytes_in_use'),
    'loss': float(metrics['loss']),
  }


def main() -> None:
  """Measures every case and records the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', help='only this preset')
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--packed', action='store_true', help='with segment ids')
  parser.add_argument(
    '--quick', action='store_true', help='a tiny model: checks the machinery'
  )
  arguments = parser.parse_args()
  cases = [c for c in _CASES if arguments.model in (None, c[0])]
  if arguments.quick:
    cases = [('test', 128, 4)]
  if not cases:
    print(
      f'error: --model={arguments.model} is none of '
      f'{sorted({c[0] for c in _CASES})}.',
      file=sys.stderr,
    )
    sys.exit(2)
  rows = []
  for model, sequence_length, batch_size in cases:
    for remat in _REMATS:
      config = make_config(model, sequence_length, batch_size, remat)
      row: dict[str, Any] = {
        'model': model,
        'num_params': transformer.num_params(config.model),
        'sequence_length': sequence_length,
        'batch_size': batch_size,
        'remat': remat,
        'packed': arguments.packed,
      }
      try:
        row |= measure(
          config, num_steps=arguments.steps, packed=arguments.packed
        )
      except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
          raise
        row['out_of_memory'] = True
      rows.append(row)
      print(row, file=sys.stderr, flush=True)
      if 'mfu' in row:
        break
  labels = (
    arguments.model,
    'packed' if arguments.packed else None,
    'quick' if arguments.quick else None,
  )
  best = max((row.get('mfu') or 0.0) for row in rows)
  harness.record(
    '_'.join(('train_mfu', *filter(None, labels))),
    {'best_mfu': best, 'rows': rows},
  )


if __name__ == '__main__':
  main()
