"""What a run says: a line a step, metadata, at the end report and drafter."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from efficient_llm.speculative import target_run
from efficient_llm.tlt import plain_decoding, rewards, rollout, spot_trainer
from efficient_llm.tlt.config import TltConfig
from efficient_llm.training import (
  chart,
  metrics,
  processes,
  report,
  sections,
  strict_json,
)
from efficient_llm.training import checkpoint as checkpoint_lib
from efficient_llm.training import loop as loop_lib

# Of a line: heading, metric, format.
_COLUMNS = (
  ('reward', 'reward', '6.3f'),
  ('p50', 'length_p50', '5.0f'),
  ('p95', 'length_p95', '5.0f'),
  ('max', 'length_max', '5.0f'),
  ('rollout s', 'rollout_secs', '9.2f'),
  ('reward s', 'reward_secs', '8.2f'),
  ('update s', 'update_secs', '8.2f'),
  ('tok/s', 'rollout_tokens_per_sec', '6.0f'),
  ('accepted', 'acceptance_length', '8.2f'),
  ('stale', 'drafter_staleness', '5.0f'),
  ('idle s', 'idle_secs', '6.2f'),
  ('used s', 'idle_used_secs', '6.2f'),
)


def step_metrics(
  answered: rollout.Outcome,
  scores: rewards.Scores,
  updated: Mapping[str, Any],
  *,
  spot: spot_trainer.SpotTrainer | None,
  update_secs: float,
  separate_secs: float,
) -> dict[str, Any]:
  """The metrics of a step, seconds of wall time where they end in _secs.

  Args:
    answered: The rollouts.
    scores: Their rewards.
    updated: From `Updater.update`.
    spot: The drafter's trainer.
    update_secs: Of the policy's update.
    separate_secs: Of the drafter's stage of its own.
  """
  lengths_N = answered.lengths_N
  p50, p95, p99 = np.percentile(lengths_N, (50, 95, 99))
  num_tokens = float(lengths_N.sum())
  training = answered.training
  # Where nothing was trained on, there was nothing wrong either.
  nothing = {'loss': 0.0, 'tokens': 0.0, 'finite': True, 'learning_rate': 0.0}
  return {
    **nothing,
    **updated,
    'reward': mean_reward(scores),
    'unparsable': float(scores.unparsable_N.mean()),
    'failed': float(scores.failed_N.mean()),
    'length_mean': num_tokens / len(lengths_N),
    'length_p50': p50,
    'length_p95': p95,
    'length_p99': p99,
    'length_max': float(lengths_N.max()),
    'rollout_secs': answered.secs,
    'rollout_compile_secs': answered.compile_secs,
    'reward_secs': scores.secs,
    'rollout_tokens': num_tokens,
    'rollout_tokens_per_sec': num_tokens / answered.secs,
    'acceptance_length': answered.acceptance_length,
    'num_passes': float(answered.num_passes),
    'passes_saved': 1 - answered.num_passes / max(1, answered.num_decoded),
    'speculative_rounds': float(
      sum(n for name, n in answered.rounds_by_shape.items() if name[0] != '0')
      / max(1, sum(answered.rounds_by_shape.values()))
    ),
    'idle_secs': answered.idle_secs,
    'idle_used_secs': training.secs - separate_secs,
    'update_secs': update_secs,
    'drafter_secs': separate_secs,
    'step_secs': answered.secs + scores.secs + update_secs + separate_secs,
    'saved_secs': answered.saved_secs,
    'drafter_steps': float(training.num_steps),
    'drafter_off': 0.0 if spot is None or spot.is_healthy else 1.0,
    'drafter_staleness': 0.0 if spot is None else float(spot.staleness),
    **(
      {'drafter_acceptance': training.acceptance} if training.num_steps else {}
    ),
  }


def mean_reward(scores: rewards.Scores) -> float:
  """Of the answers whose reward did not fail; 0 if all did."""
  rewards_N = scores.rewards_N[~scores.failed_N]
  return float(rewards_N.mean()) if rewards_N.size else 0.0


def show(step: int, values: Mapping[str, Any]) -> None:
  """Logs a line of the table, and now and then its heading."""
  if step % 20 == 1:
    names = (f'{name:>{int(x.split(".")[0])}}' for name, _, x in _COLUMNS)
    logging.info(' step %s', ' '.join(names))
  cells = (f'{values[name]:{x}}' for _, name, x in _COLUMNS)
  logging.info('%5d %s', step, ' '.join(cells))


def metadata(config: TltConfig, target: target_run.TargetRun) -> dict[str, Any]:
  """What a reader of a checkpoint needs, as its model's run has it."""
  as_data = json.loads(
    strict_json.to_json(
      {
        'config': {
          **dataclasses.asdict(config),
          'data': dataclasses.asdict(target.data),
        },
        'model': dataclasses.asdict(target.model),
      }
    )
  )
  return {**as_data, 'tokenizer': dict(target.tokenizer)}


def write(
  config: TltConfig, outcome: loop_lib.Outcome, *, workdir: pathlib.Path
) -> None:
  """Writes the drafter for `experiments.generate`, result.json, report.html."""
  if jax.process_index() == 0:
    _report(config, outcome, workdir)
  if outcome.state.drafter is None:
    return
  if drafter_is_off(workdir):
    logging.warning('The drafter was switched off, so that none is written.')
  else:
    _write_drafter(config, outcome, workdir)


def drafter_is_off(workdir: pathlib.Path) -> bool:
  """Whether the run has lost its drafter, by its last line of metrics."""
  return processes.on_first(
    lambda: metrics.read_metrics(workdir, kind='train')[-1]['drafter_off'] > 0
  )


def _report(
  config: TltConfig, outcome: loop_lib.Outcome, workdir: pathlib.Path
) -> None:
  records = metrics.read_metrics(workdir, kind='train')
  evaluations = metrics.read_metrics(workdir, kind='eval')
  last, saved = records[-1], plain_decoding.savings(records)
  report.write_result(
    workdir,
    {
      'num_steps': int(outcome.state.step),
      'num_tokens': outcome.num_tokens,
      'eval_reward': outcome.eval_metrics['reward'],
      'final': {name: x for name, x in last.items() if name != 'time'},
      'rollout_share': _total(records, 'rollout_secs')
      / _total(records, 'step_secs'),
      'drafter_off': last['drafter_off'] > 0,
      'idle_secs': _total(records, 'idle_secs'),
      'idle_used_secs': _total(records, 'idle_used_secs'),
      **saved,
      'config': dataclasses.asdict(config),
    },
  )
  steps = [record['step'] for record in records]

  def curve(title: str, unit: str, **names: str) -> chart.Curve:
    series = [
      chart.Series(label, steps, [record[name] for record in records])
      for label, name in names.items()
    ]
    return chart.Curve(title, series, 'steps', unit, from_zero=True)

  tiles = []
  if saved:
    tiles.append(
      sections.Tile(
        'Speed against plain decoding',
        saved['speedup_step'],
        'times',
        f'rollouts alone {saved["speedup_rollout"]:.2f}; '
        f'{saved["plain_same_tokens"]:.1%} of tokens the same',
      )
    )
  rewards_shown = [
    chart.Series('training', steps, [record['reward'] for record in records]),
    chart.Series(
      'held out',
      [record['step'] for record in evaluations],
      [record['reward'] for record in evaluations],
    ),
  ]
  report.write_report(
    workdir,
    title='Reinforcement learning',
    sections=[
      sections.KeyNumbers(
        [
          sections.Tile('Reward, held out', outcome.eval_metrics['reward']),
          sections.Tile(
            'Tokens per target pass',
            last['acceptance_length'],
            note='drafter switched off' if last['drafter_off'] else '',
          ),
          *tiles,
        ]
      ),
      chart.Curve('Reward', rewards_shown, 'steps', 'mean', from_zero=True),
      curve(
        'Length of answers',
        'tokens',
        median='length_p50',
        p95='length_p95',
        longest='length_max',
      ),
      curve(
        'Time of a step',
        'seconds',
        rollout='rollout_secs',
        reward='reward_secs',
        update='update_secs',
      ),
      curve('Tokens per target pass', 'tokens', accepted='acceptance_length'),
      curve('Idle time', 'seconds', found='idle_secs', used='idle_used_secs'),
      *report.training_sections(workdir),
    ],
  )


def _total(records: Sequence[Mapping[str, Any]], name: str) -> float:
  return sum(record[name] for record in records)


def _write_drafter(
  config: TltConfig, outcome: loop_lib.Outcome, workdir: pathlib.Path
) -> None:
  """As a drafter's run for the policy's last checkpoint."""
  target = target_run.find(workdir)
  saver = checkpoint_lib.Checkpointer(
    workdir / 'drafter' / 'checkpoints', checkpoint_lib.CheckpointConfig()
  )
  saver.save(
    int(outcome.state.step),
    {'params': outcome.state.drafter.params},
    data_state=None,
    metadata={**metadata(config, target), 'target': target.describe()},
  )
  saver.close()
