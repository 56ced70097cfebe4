"""What TLT saves in reinforcement learning, end to end, on two CPU cores.

    ./run.sh python -m benchmarks.tlt_end_to_end [--quick] [--config=FILE]

A model is trained on worked examples with slips, and a drafter for it; both are
kept under --cache_dir and are not timed. Then every arm goes through the same
steps of reinforcement learning from there, two workers of one core each; arms
take turns step by step. Plain decoding is this engine's own at its best: rows
in one queue for both workers, batches that shrink, compiled loops.

Arms: plain; ngram copies finished answers (TLT-Base); frozen has the first
drafter; adaptive trains it in idle time; separate trains it in a stage of its
own; fixed is adaptive without a bandit.

The ceiling is what the measured cost of passes allows if drafts cost nothing:
at every batch size the cheapest of one token a pass and of k tokens a pass with
the drafter's acceptance.

plain_vs_hf is the speed of plain decoding against that of transformers, with
the same weights and equal work, where both are there. Curves of all arms stand
in an HTML file beside the result. With --config any configuration is measured,
its own way of training the drafter in place of idle time where it has another.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time
from typing import Any

import jax

from benchmarks import (
  harness,
  lossless,
  pass_cost,
  tlt_peer,
  tlt_table,
)
from efficient_llm.speculative import strategy_config
from efficient_llm.tlt import start as start_lib
from efficient_llm.tlt import trainer as trainer_lib
from efficient_llm.tlt.config import TltConfig
from experiments import configuration, cpu_workers

_CONFIG = 'experiments/configs/tlt_cpu.py'
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

  ours = config.rollout.speculation
  fixed = dataclasses.replace(
    config.rollout.strategy, name='fixed', arms=('7_1_8',), thresholds=(1,)
  )
  return {
    'plain': arm('off'),
    'ngram': arm('ngram', strategy=strategy_config.CPU),
    'frozen': arm(ours),
    'adaptive': arm(ours, 'adaptive'),
    'separate': arm(ours, 'separate'),
    'fixed': arm(ours, 'adaptive', strategy=fixed),
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
    before = trainers['plain'].evaluate(states['plain'])
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
      found[name]['held_out_start'] = before
  finally:
    for trainer in trainers.values():
      trainer.__exit__()
  return found


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
  for step in plain['steps'][tlt_table.NUM_UNTIMED :]:
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
  arguments, config, chosen = _arguments()
  mode = config.drafter.mode
  cpu_workers.make_devices(2)
  num_steps = 6 if arguments.quick else arguments.steps
  start = start_lib.prepare(config, arguments.cache_dir.absolute())
  if not isinstance(start, start_lib.Start):
    raise SystemExit(3)
  begun = time.perf_counter()
  found = run_arms(chosen, start, num_steps=num_steps)
  table = {
    name: tlt_table.summary(x, num_eval=config.eval_problems)
    for name, x in found.items()
  }
  params = start.target.restore_params(None)
  costs = {
    size: {
      k: pass_cost.pass_secs(
        start.target.model,
        params,
        batch_size=size,
        num_nodes=k,
        num_tokens=config.update.sequence_length,
      )
      for k in _NODES
    }
    for size in sorted(
      {n for s in found['plain']['steps'] for n in s['rounds_by_size']}
    )
  }
  ours, plain = table[mode], table['plain']
  acceptance = statistics.mean(
    step['drafter_acceptance']
    for step in found[mode]['steps']
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
  peer = tlt_peer.compare(
    config,
    start,
    cache_dir=arguments.cache_dir.absolute(),
    rounds=1 if arguments.quick else 5,
  )
  name = 'tlt_end_to_end'
  if arguments.config != _CONFIG:
    name += f'_{pathlib.Path(arguments.config).stem}'
  shown = harness.picture(name, 'TLT end to end', tlt_table.curves(table))
  print(f'{shown}; transformers: {peer["hf_note"]}', file=sys.stderr)
  harness.record(
    name,
    {
      'quick': arguments.quick,
      'config': arguments.config,
      **speedups,
      **peer,
      'rollout_share_baseline': plain['rollout_share'],
      'reward_start': ours['reward_start'],
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
      'num_untimed_steps': tlt_table.NUM_UNTIMED,
      'seed': config.seed,
      'secs': time.perf_counter() - begun,
    },
  )


def _arguments() -> tuple[argparse.Namespace, TltConfig, dict[str, TltConfig]]:
  """Flags, configuration, and the arms that are wanted."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='two arms, 6 steps')
  parser.add_argument('--steps', type=int, default=45)
  parser.add_argument('--arms', help="names, joined by ','; or all")
  parser.add_argument('--config', default=_CONFIG, help='a configuration file')
  parser.add_argument('--cache_dir', type=pathlib.Path, default='out/tlt')
  arguments = parser.parse_args()
  try:
    config = configuration.resolve(arguments.config, TltConfig, {})
  except ValueError as error:
    parser.error(str(error))
  mode, known = config.drafter.mode, arms(config)
  if mode == 'frozen':
    parser.error("drafter.mode='frozen' trains nothing; choose another.")
  names = (arguments.arms or f'plain,ngram,frozen,{mode}').split(',')
  if arguments.quick:
    names = ['plain', mode]
  elif arguments.arms == 'all':
    names = list(known)
  if not {'plain', mode} <= set(names) <= set(known):
    parser.error(
      f'--arms={arguments.arms} must name plain, {mode} and only arms of '
      f'{", ".join(known)}.'
    )
  if arguments.steps <= tlt_table.NUM_UNTIMED:
    parser.error(
      f'--steps={arguments.steps} must be above the {tlt_table.NUM_UNTIMED} '
      'untimed ones.'
    )
  return arguments, config, {name: known[name] for name in names}


if __name__ == '__main__':
  main()
