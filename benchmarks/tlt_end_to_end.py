"""What TLT saves in reinforcement learning, end to end, on two CPU cores.

    ./run.sh python -m benchmarks.tlt_end_to_end [--quick]

A model is trained on worked examples with slips, and a drafter for it; both are
kept under --cache_dir and are not timed. Then every arm goes through the same
steps of reinforcement learning from there, two workers of one core each; arms
take turns step by step. Plain decoding is this engine's own at its best: rows
in one queue for both workers, batches that shrink, compiled loops.

Arms: plain; ngram copies finished answers (TLT-Base); frozen adds the first
drafter; adaptive trains it in idle time; separate trains it in a stage of its
own; fixed is adaptive without a bandit.

The ceiling is what the measured cost of passes allows if drafts cost nothing:
at every batch size the cheapest of one token a pass and of k tokens a pass with
the drafter's acceptance.
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks import harness, lossless, pass_cost
from efficient_llm.speculative import strategy
from efficient_llm.tlt import start as start_lib
from efficient_llm.tlt import trainer as trainer_lib
from efficient_llm.tlt.config import TltConfig
from experiments.configs import tlt_cpu

# Programs are compiled and places filled for so many steps.
_NUM_UNTIMED = 4
_NODES = (1, 4, 8)


def arms(config: TltConfig) -> dict[str, TltConfig]:
  """What is compared, by name; each differs from the first in one thing."""

  def arm(speculation: str, mode: str = 'frozen', **rollout: Any) -> TltConfig:
    return dataclasses.replace(
      config,
      rollout=dataclasses.replace(
        config.rollout, speculation=speculation, **rollout
      ),
      drafter=dataclasses.replace(config.drafter, mode=mode),
    )

  fixed = dataclasses.replace(
    config.rollout.strategy,
    name='fixed',
    arms=('7_1_8', '3_1_4c', '0_1_1'),
    thresholds=(1, 2, 5),
  )
  return {
    'plain': arm('off'),
    'ngram': arm('ngram', strategy=strategy.CPU),
    'frozen': arm('union'),
    'adaptive': arm('union', 'adaptive'),
    'separate': arm('union', 'separate'),
    'fixed': arm('union', 'adaptive', strategy=fixed),
  }


def run_arms(
  configs: dict[str, TltConfig], start: start_lib.Start, *, num_steps: int
) -> dict[str, dict[str, Any]]:
  """Steps of all arms in turn; gives every step's metrics and the end's."""
  trainers, states = {}, {}
  found: dict[str, dict[str, Any]] = {}
  for name, config in configs.items():
    trainers[name] = trainer_lib.Trainer(config, start)
    states[name] = trainers[name].init_state()
    found[name] = {'steps': [], 'lengths': []}
  try:
    for step in range(num_steps):
      names = list(configs)
      for name in names if step % 2 else names[::-1]:
        trainer = trainers[name]
        states[name], metrics = trainer.step(states[name], next(trainer))
        sizes = trainer.last_outcome.rounds_by_size
        found[name]['steps'].append({**metrics, 'rounds_by_size': sizes})
        found[name]['lengths'] += trainer.last_outcome.lengths_N.tolist()
      line = '  '.join(
        f'{name} {found[name]["steps"][-1]["reward"]:.3f} '
        f'{found[name]["steps"][-1]["step_secs"]:.1f}s '
        f'{found[name]["steps"][-1]["acceptance_length"]:.2f}'
        for name in configs
      )
      print(f'step {step + 1}/{num_steps}: {line}', file=sys.stderr)
    for name, trainer in trainers.items():
      found[name]['held_out'] = trainer.evaluate(states[name])
  finally:
    for trainer in trainers.values():
      trainer.__exit__()
  return found


def summary(found: dict[str, Any], *, num_eval: int) -> dict[str, Any]:
  """Of one arm, over the timed steps."""
  steps = found['steps']
  timed = steps[_NUM_UNTIMED:]
  total = {
    name: sum(step[name] for step in timed)
    for name in ('step_secs', 'rollout_secs', 'rollout_tokens', 'num_passes')
  }
  reward = found['held_out']['reward']
  # Normal approximation of the binomial.
  margin = 1.96 * float(np.sqrt(max(reward * (1 - reward), 1e-4) / num_eval))
  last = steps[-5:]
  p50, p99 = np.percentile(found['lengths'], (50, 99)).tolist()
  return {
    **total,
    'rollout_share': total['rollout_secs'] / total['step_secs'],
    'reward_final': reward,
    'reward_interval': [reward - margin, reward + margin],
    'reward_first': statistics.mean(step['reward'] for step in steps[:3]),
    'reward_last': statistics.mean(step['reward'] for step in last),
    'acceptance_first': statistics.mean(
      step['acceptance_length'] for step in steps[:5]
    ),
    'acceptance_last': statistics.mean(
      step['acceptance_length'] for step in last
    ),
    'passes_saved': 1 - total['num_passes'] / total['rollout_tokens'],
    'idle_seconds_found': sum(step['idle_secs'] for step in timed),
    'idle_seconds_used': sum(step['idle_used_secs'] for step in timed),
    'drafter_steps': sum(step['drafter_steps'] for step in steps),
    'p99_by_p50': p99 / p50,
    'reward_by_step': [step['reward'] for step in steps],
    'acceptance_by_step': [step['acceptance_length'] for step in steps],
    'rollout_secs_by_step': [step['rollout_secs'] for step in steps],
    'step_secs_by_step': [step['step_secs'] for step in steps],
  }


def ceiling(
  plain: dict[str, Any],
  costs: dict[int, dict[int, float]],
  *,
  acceptance: float,
  rollout_share: float,
) -> dict[str, float]:
  """Speedups that the cost of passes allows where drafts cost nothing.

  Args:
    plain: The arm without speculation.
    costs: Seconds of a pass by batch size and tokens a row.
    acceptance: Chance that a draft is accepted, at every depth.
    rollout_share: Of the time of a step.
  """
  usual = best = 0.0
  for step in plain['steps'][_NUM_UNTIMED:]:
    for size, rounds in step['rounds_by_size'].items():
      by_nodes = costs[size]
      usual += rounds * by_nodes[1]
      best += rounds * min(
        by_nodes[k] * (1 - acceptance) / (1 - acceptance**k) for k in by_nodes
      )
  rollout = usual / best
  return {
    'ceiling_rollout': rollout,
    'ceiling_end_to_end': 1 / (1 - rollout_share + rollout_share / rollout),
  }


def main() -> None:
  """Measures the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='two arms, 6 steps')
  parser.add_argument('--steps', type=int, default=30)
  parser.add_argument(
    '--arms', default='plain,ngram,frozen,adaptive', help='or all'
  )
  parser.add_argument('--cache_dir', type=pathlib.Path, default='out/tlt')
  arguments = parser.parse_args()
  # Before the first device is asked for: a device of each core.
  jax.config.update('jax_num_cpu_devices', 2)
  options = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{options} --xla_cpu_multi_thread_eigen=false'
  config = tlt_cpu.get_config()
  num_steps = 6 if arguments.quick else arguments.steps
  start = start_lib.prepare(config, arguments.cache_dir.absolute())
  if not isinstance(start, start_lib.Start):
    raise SystemExit(3)
  begun = time.perf_counter()
  chosen = arms(config)
  if arguments.quick:
    chosen = {name: chosen[name] for name in ('plain', 'adaptive')}
  elif arguments.arms != 'all':
    chosen = {name: chosen[name] for name in arguments.arms.split(',')}
  found = run_arms(chosen, start, num_steps=num_steps)
  table = {
    name: summary(x, num_eval=config.eval_problems) for name, x in found.items()
  }
  params = start.target.restore_params(None)
  costs = {
    size: {
      k: pass_cost.pass_secs(
        start.target.model, params, batch_size=size, num_nodes=k, num_tokens=672
      )
      for k in _NODES
    }
    for size in sorted(
      {n for s in found['plain']['steps'] for n in s['rounds_by_size']}
    )
  }
  ours, plain = table['adaptive'], table['plain']
  acceptance = statistics.mean(
    step['drafter_acceptance']
    for step in found['adaptive']['steps']
    if 'drafter_acceptance' in step
  )
  limits = ceiling(
    found['plain'],
    costs,
    acceptance=min(acceptance, 0.999),
    rollout_share=plain['rollout_share'],
  )
  speedups = {
    f'speedup_{name}': plain[f'{key}_secs'] / ours[f'{key}_secs']
    for name, key in (('end_to_end', 'step'), ('rollout', 'rollout'))
  }
  tv = lossless.enumerate_laws(num_new=3, quick=True)
  harness.record(
    'tlt_end_to_end',
    {
      'quick': arguments.quick,
      **speedups,
      'rollout_share_baseline': plain['rollout_share'],
      'reward_final': ours['reward_final'],
      'p99_by_p50': plain['p99_by_p50'],
      'idle_seconds_found': ours['idle_seconds_found'],
      'idle_seconds_used': ours['idle_seconds_used'],
      'forward_passes_saved': ours['passes_saved'],
      'tv_certificate': max(tv.values()),
      **limits,
      'fraction_of_ceiling': (
        speedups['speedup_end_to_end'] / limits['ceiling_end_to_end']
      ),
      'drafter_acceptance': acceptance,
      'pass_secs_by_batch_and_nodes': costs,
      'speedup_by_arm': {
        name: {
          'end_to_end': plain['step_secs'] / row['step_secs'],
          'rollout': plain['rollout_secs'] / row['rollout_secs'],
        }
        for name, row in table.items()
      },
      'arms': table,
      'num_params': sum(x.size for x in jax.tree.leaves(params)),
      'num_steps': num_steps,
      'num_untimed_steps': _NUM_UNTIMED,
      'seed': config.seed,
      'secs': time.perf_counter() - begun,
    },
  )


if __name__ == '__main__':
  main()
