"""Decoding speed with and without speculation, and of Hugging Face's.

    ./run.sh python -m benchmarks.speculative_speed [--quick] [--size=PRESET]

Trains a target and its drafter on real text and keeps them. The same prompts
are then completed plainly and with speculation, a bandit choosing the draft
shape, and by transformers with the same weights: plainly, with prompt lookup,
and assisted by a small model. All take turns; a turn's time is that of whole
calls, prompts included and compilation left out. Needs the extras [hf] and
[torch].

For each batch size:
  plain_tps, spec_tps     new tokens a second
  speedup                 median over rounds of their ratio
  acceptance_length       tokens per target pass and row
  passes_saved            share of the target's passes that were not needed
  ceiling                 acceptance_length x t(1) / t(k): t(k) is a measured
                          pass over the k nodes of the shape that ran most
  fraction_of_ceiling     speedup / ceiling: what drafting and the engine leave
  hf_plain_tps, hf_best_tps
"""

import argparse
import importlib.util
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks import harness, hf_decoding, pass_cost, trained_pair
from efficient_llm.models import sampling as sampling_lib
from efficient_llm.models import transformer
from efficient_llm.speculative import (
  drafting,
  engine,
  strategy,
  strategy_config,
)
from efficient_llm.speculative import generation as generation_lib

_NUM_PROMPT, _NUM_NEW = 48, 128
_NUM_WARM_UP = 1


def measure(
  pair: trained_pair.Pair,
  peer: hf_decoding.Peer | None,
  *,
  batch_size: int,
  temperature: float,
  rounds: int,
) -> dict[str, Any]:
  """One row of the table.

  Args:
    pair: Target and drafter.
    peer: Decodes greedily too; None leaves it out.
    batch_size: Rows decoded together.
    temperature: 0 is greedy.
    rounds: In which all take turns.
  """
  # Enough that the last rows, which leave places empty, do not decide.
  num_rows = max(8, 4 * batch_size)
  prompts = pair.prompts(num_rows, num_tokens=_NUM_PROMPT)
  lengths = np.full(num_rows, _NUM_PROMPT, np.int32)
  sampling = sampling_lib.SamplingConfig(_NUM_NEW, temperature=temperature)
  chooser = strategy.Strategy(strategy_config.CPU_COPYING)
  plain = engine.Engine(pair.config, max_batch=batch_size)
  speculative = engine.Engine(
    pair.config,
    drafter=drafting.union(pair.config),
    chooser=chooser,
    max_batch=batch_size,
  )
  draft_params = {'learned': pair.draft_params, 'model_free': None}
  key = jax.random.key(0)

  def generate(machine: engine.Engine) -> generation_lib.Generation:
    return machine.generate(
      pair.params,
      prompts,
      lengths,
      sampling,
      key,
      draft_params=None if machine is plain else draft_params,
    )

  arms = {'plain': plain, 'speculative': speculative}
  modes: list[str] = []
  if peer is not None and not temperature:
    # All but its plain decoding take one row at a time.
    modes = list(hf_decoding.MODES if batch_size == 1 else ('hf_plain',))
  # Of the peer's modes, whichever the round that is not counted found faster:
  # one thread for each core, or one.
  num_threads: dict[str, int] = {}
  secs: dict[str, list[float]] = {name: [] for name in (*arms, *modes)}
  done: dict[str, generation_lib.Generation] = {}
  counted, compile_secs = generation_lib.Stats(), 0.0
  agrees: float | None = None
  # In the first round, not counted, programs compile and the bandit tries arms.
  for index in range(-_NUM_WARM_UP, rounds):
    for name in list(secs)[:: 1 if index % 2 == 0 else -1]:
      # A turn begins with a part that is not timed: memory given back while the
      # others ran comes back page by page, which is no part of a steady run.
      if name in arms:
        compile_secs += generate(arms[name]).stats.compile_secs
        done[name] = generate(arms[name])
        spent = done[name].stats.secs
        compile_secs += done[name].stats.compile_secs
      elif peer is not None:
        # An OpenMP team or a pool of the arm before may still be spinning.
        time.sleep(0.2)
        if index < 0:
          num_threads[name] = peer.fastest_threads(
            name,
            prompts[: 2 * batch_size],
            batch_size=batch_size,
            num_new=_NUM_NEW,
          )
        threads = num_threads[name]
        peer.decode(
          name,
          prompts[:batch_size],
          batch_size=batch_size,
          num_new=8,
          num_threads=threads,
        )
        spent, tokens = peer.decode(
          name,
          prompts,
          batch_size=batch_size,
          num_new=_NUM_NEW,
          num_threads=threads,
        )
        time.sleep(0.2)
        if name == 'hf_plain' and 'plain' in done:
          ours = np.asarray(done['plain'].completion.tokens)
          agrees = float((tokens == ours).all(1).mean())
      else:
        continue
      if index >= 0:
        secs[name].append(spent)
    if index >= 0:
      stats = done['speculative'].stats
      counted.num_decoded += stats.num_decoded
      counted.num_passes += stats.num_passes
      for shape, count in stats.rounds_by_shape.items():
        before = counted.rounds_by_shape.get(shape, 0)
        counted.rounds_by_shape[shape] = before + count
  tps = {
    name: num_rows * _NUM_NEW / statistics.median(values)
    for name, values in secs.items()
  }
  speedups = [
    p / s for p, s in zip(secs['plain'], secs['speculative'], strict=True)
  ]
  usual = max(counted.rounds_by_shape, key=counted.rounds_by_shape.__getitem__)
  pass_secs_by_nodes = {
    num_nodes: pass_cost.pass_secs(
      pair.config,
      pair.params,
      batch_size=batch_size,
      num_nodes=num_nodes,
      num_tokens=_NUM_PROMPT + _NUM_NEW,
    )
    for num_nodes in sorted({1, usual.num_nodes})
  }
  ceiling = counted.acceptance_length * (
    pass_secs_by_nodes[1] / pass_secs_by_nodes[usual.num_nodes]
  )
  speedup = statistics.median(speedups)
  row: dict[str, Any] = {
    'batch_size': batch_size,
    'temperature': temperature,
    'plain_tps': tps['plain'],
    'spec_tps': tps['speculative'],
    'speedup': speedup,
    'speedup_by_round': speedups,
    'acceptance_length': counted.acceptance_length,
    'passes_saved': 1 - counted.num_passes / counted.num_decoded,
    'ceiling': ceiling,
    'fraction_of_ceiling': speedup / ceiling,
    'pass_secs_by_nodes': pass_secs_by_nodes,
    'rounds_by_shape': {
      shape.name: count for shape, count in counted.rounds_by_shape.items()
    },
    'compile_secs': compile_secs,
    'same_as_plain': bool(
      np.array_equal(
        done['plain'].completion.tokens, done['speculative'].completion.tokens
      )
    ),
  }
  if modes:
    row |= {
      'hf_plain_tps': tps['hf_plain'],
      'hf_best_tps': max(tps[mode] for mode in modes),
      'hf_tps': {mode: tps[mode] for mode in modes},
      'hf_num_threads': num_threads,
      'rows_as_hf': agrees,
    }
  return row


def _peer(
  cache_dir: pathlib.Path, pair: trained_pair.Pair, *, num_steps: int
) -> hf_decoding.Peer:
  """The other library with the same target, and a small model to assist it."""
  small = trained_pair.load_or_train_target(
    cache_dir, size='ladder_200k', num_steps=num_steps
  )
  paths = cache_dir / 'hf_target.npz', cache_dir / 'hf_assistant.npz'
  hf_decoding.write_weights(paths[0], pair.config, pair.params)
  hf_decoding.write_weights(paths[1], small.model, small.restore_params(None))
  return hf_decoding.Peer(*paths)


def main() -> None:
  """Measures the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='batch 1 and 8 only')
  parser.add_argument(
    '--size', default='ladder_5m', help='preset of the target'
  )
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--cache_dir', type=pathlib.Path, default='out/pair')
  arguments = parser.parse_args()
  for name in ('torch', 'transformers'):
    if importlib.util.find_spec(name) is None:
      print(
        f"error: the peer needs {name}, which is not installed; run './run.sh "
        "pip install torch==2.13.0 transformers' first.",
        file=sys.stderr,
      )
      sys.exit(2)
  start = time.perf_counter()
  pair = trained_pair.load_or_train(arguments.cache_dir, size=arguments.size)
  peer = _peer(arguments.cache_dir, pair, num_steps=400)
  training_secs = time.perf_counter() - start
  cases = [(0.0, batch_size) for batch_size in (1, 2, 4, 8, 16)]
  cases += [(1.0, 1), (1.0, 8)]
  if arguments.quick:
    cases = [(0.0, 1), (0.0, 8)]
  rows = []
  for temperature, batch_size in cases:
    row = measure(
      pair,
      peer,
      batch_size=batch_size,
      temperature=temperature,
      rounds=arguments.rounds,
    )
    rows.append(row)
    shown = {k: v for k, v in row.items() if isinstance(v, float | int)}
    print(
      ', '.join(f'{name} {value:.4g}' for name, value in shown.items()),
      row['rounds_by_shape'],
      file=sys.stderr,
      flush=True,
    )
  peer.stop()
  greedy = [row for row in rows if not row['temperature']]
  harness.record(
    'speculative_speed',
    {
      'size': arguments.size,
      'num_params': transformer.num_params(pair.config),
      'speedup_batch1': greedy[0]['speedup'],
      'speedup_min': min(row['speedup'] for row in rows),
      'plain_vs_hf_min': min(
        row['plain_tps'] / row['hf_plain_tps'] for row in greedy
      ),
      'fraction_of_ceiling': greedy[0]['fraction_of_ceiling'],
      'rows': rows,
      'peer_versions': peer.versions,
      'num_prompt': _NUM_PROMPT,
      'num_new': _NUM_NEW,
      'training_secs': training_secs,
      'secs': time.perf_counter() - start,
    },
  )


if __name__ == '__main__':
  main()
