"""What benchmarks.tlt_end_to_end says of an arm, and its page of curves."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efficient_llm.training import chart, sections

# Programs are compiled and places filled for so many steps.
NUM_UNTIMED = 4


def summary(found: dict[str, Any], *, num_eval: int) -> dict[str, Any]:
  """Of one arm, over the timed steps."""
  steps = found['steps']
  timed = steps[NUM_UNTIMED:]
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
    'reward_start': found['held_out_start']['reward'],
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
    'update_secs_by_step': [step['update_secs'] for step in steps],
    'step_secs_by_step': [step['step_secs'] for step in steps],
  }


def curves(arms: Mapping[str, Mapping[str, Any]]) -> list[sections.Section]:
  """Learning curves, acceptance and the time of a step.

  Args:
    arms: By name, what `summary` gives.
  """
  drafting = [name for name in arms if name != 'plain']
  return [
    sections.Table(
      'Arms',
      ('arm', 'held-out reward', 'tokens a pass', 'seconds'),
      [
        (name, arm['reward_final'], arm['acceptance_last'], arm['step_secs'])
        for name, arm in arms.items()
      ],
      note='Tokens a target pass in the last steps; seconds of timed steps.',
    ),
    _by_step('Reward', 'mean of a step', arms, list(arms), 'reward_by_step'),
    _by_step(
      'Tokens per target pass', 'tokens', arms, drafting, 'acceptance_by_step'
    ),
    *(_stacked(name, arm) for name, arm in arms.items()),
  ]


def _by_step(
  title: str,
  unit: str,
  arms: Mapping[str, Mapping[str, Any]],
  names: Sequence[str],
  key: str,
) -> chart.Curve:
  lines = [_line(name, arms[name][key]) for name in names]
  return chart.Curve(title, lines, 'steps', unit, from_zero=True)


def _stacked(name: str, arm: Mapping[str, Any]) -> chart.Curve:
  """Each line has what it names on top of the line below."""
  rollout = np.asarray(arm['rollout_secs_by_step'])
  update = rollout + np.asarray(arm['update_secs_by_step'])
  lines = [
    _line('and the rest', arm['step_secs_by_step']),
    _line('and update', update.tolist()),
    _line('rollout', rollout.tolist()),
  ]
  return chart.Curve(
    f'Time of a step, {name}', lines, 'steps', 'seconds', from_zero=True
  )


def _line(label: str, values: Sequence[float]) -> chart.Series:
  return chart.Series(label, list(range(1, len(values) + 1)), values)
