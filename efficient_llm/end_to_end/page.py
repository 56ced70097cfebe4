"""The page of the line: every saving beside its baseline, and the curves."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from efficient_llm.end_to_end.stages import Line
from efficient_llm.training import chart, metrics, report, sections, units

_NAMES = {
  'predict': 'Predict (scaling law)',
  'grow': 'Grow (LiGO)',
  'distribute': 'Distribute (DiLoCo)',
  'reason': 'Reason (TLT)',
}


def write(line: Line, result: Mapping[str, Any]) -> pathlib.Path:
  """Writes report.html; gives its path.

  Args:
    line: All of whose stages are done.
    result: From `summary.make`.
  """
  made_by = report.environment()
  return report.write_report(
    line.workdir,
    title='A model trained for less, in four ways',
    subtitle=(
      f'{line.result("scratch")["num_params"]:,} parameters, '
      f'{units.format_duration(result["total_secs"])} on '
      f'{made_by["device_count"]} x {made_by["device_kind"]}'
    ),
    sections=[
      sections.KeyNumbers(_tiles(result)),
      _verdicts(result),
      _baselines(result),
      *_curves(line, result),
      *_samples(line),
      _times(result),
      sections.Configuration(dataclasses.asdict(line.config)),
      sections.Configuration(made_by, title='Versions and device'),
    ],
  )


def _tiles(result: Mapping[str, Any]) -> list[sections.Tile]:
  low, high = result['interval90']
  saving = result['growth_flops_saving']
  reduction = result['diloco_byte_reduction']
  inside = 'inside' if result['is_inside_interval'] else 'outside'
  return [
    sections.Tile(
      'Predicted loss',
      f'{result["predicted_loss"]:.3f}',
      'nats',
      f'90 % interval {low:.3f} to {high:.3f}',
    ),
    sections.Tile(
      'Achieved', f'{result["achieved_loss"]:.3f}', 'nats', f'{inside} it'
    ),
    sections.Tile(
      'Growth',
      'none' if saving is None else f'{saving:.0%}',
      'fewer FLOPs' if saving is not None else '',
      'than from nothing, to the same loss',
    ),
    sections.Tile(
      'Islands',
      'none' if reduction is None else f'{reduction:,.0f} x',
      'fewer bytes' if reduction is not None else '',
      f'{result["diloco_loss_ratio"] - 1:+.1%} loss against data-parallel',
    ),
    sections.Tile(
      'Reinforcement learning',
      f'{result["rl_speedup"]:.2f} x',
      'as fast',
      'as without speculation',
    ),
    sections.Tile(
      'Problems solved',
      f'{result["rl_reward_after"]:.0%}',
      '',
      f'{result["rl_reward_before"]:.0%} before, held out',
    ),
  ]


def _verdicts(result: Mapping[str, Any]) -> sections.Section:
  rows = [(_NAMES[name], text) for name, text in result['verdicts'].items()]
  return sections.Table('What each technique did', ('', ''), rows)


def _baselines(result: Mapping[str, Any]) -> sections.Section:
  saved, cold = (
    result['growth_flops_saving'],
    result['growth_flops_saving_cold'],
  )
  rows = [
    (
      'loss, nats a token',
      'predicted',
      result['predicted_loss'],
      result['achieved_loss'],
      f'{result["predicted_loss"] / result["achieved_loss"] - 1:+.1%}',
    ),
    (
      'FLOPs to the same loss',
      'from nothing',
      1.0,
      None if saved is None else 1 - saved,
      'small model given',
    ),
    (
      'the same',
      'from nothing',
      1.0,
      None if cold is None else 1 - cold,
      'its training counted',
    ),
    (
      'bytes sent by a worker',
      'data-parallel',
      result['data_parallel_bytes'],
      result['diloco_bytes_per_island'],
      '',
    ),
    (
      'loss at equal tokens',
      'data-parallel',
      result['data_parallel_loss'],
      result['diloco_loss'],
      f'{result["diloco_loss_ratio"] - 1:+.1%}',
    ),
    (
      'seconds of RL steps',
      'plain decoding',
      result['rl_secs_without'],
      result['rl_secs'],
      f'{result["rl_speedup"]:.2f} x',
    ),
    (
      'held-out problems solved',
      'before RL',
      result['rl_reward_before'],
      result['rl_reward_after'],
      '',
    ),
  ]
  return sections.Table(
    'Beside its baseline',
    ('what', 'against', 'baseline', 'ours', 'note'),
    rows,
    note='Every baseline was measured in this run. Seconds leave out steps in '
    'which something was compiled.',
  )


def _curves(line: Line, result: Mapping[str, Any]) -> list[sections.Section]:
  folder = line.workdir
  ladder = [line.rung(i) for i in range(len(line.config.ladder))]
  scratch_flops = line.result('scratch')['flops']
  card = line.result('growth')['growth']
  extra = card['operator_flops'] + card['probe_flops']
  names = [units.format_count(line.result(x)['num_params']) for x in ladder]
  low, high = result['interval90']
  records = metrics.read_metrics(folder / 'reasoning', kind='train')
  held_out = metrics.read_metrics(folder / 'reasoning', kind='eval')
  steps = [x['step'] for x in records]
  measured = [x for x in records if 'plain_step_secs' in x]
  # Six lines can be told apart.
  shown = list(zip(names, ladder, strict=True))[-4:]
  return [
    chart.Curve(
      'Predicted and achieved',
      [
        *(_losses(line, name, x, by='flops') for name, x in shown),
        _losses(line, 'target', folder / 'scratch', by='flops'),
        chart.Series(
          '90 % interval', [scratch_flops, scratch_flops], [low, high]
        ),
      ],
      'training FLOPs',
      'validation loss, nats a token',
      log_x=True,
    ),
    chart.Curve(
      'Grown, and from nothing',
      [
        _losses(line, 'grown', folder / 'growth', by='flops', more=extra),
        _losses(line, 'from nothing', folder / 'scratch', by='flops'),
      ],
      'FLOPs of the large model, operator and trials included',
      'validation loss, nats a token',
    ),
    chart.Curve(
      'Islands, and data-parallel training',
      [
        _losses(line, 'islands', folder / 'islands', by='tokens'),
        _losses(line, 'data-parallel', folder / 'control', by='tokens'),
      ],
      'tokens',
      'validation loss, nats a token',
    ),
    chart.Curve(
      'Reward',
      [
        chart.Series('training', steps, [x['reward'] for x in records]),
        chart.Series(
          'held out',
          [x['step'] for x in held_out],
          [x['reward'] for x in held_out],
        ),
      ],
      'steps',
      'share solved',
      from_zero=True,
    ),
    chart.Curve(
      'Time of a step',
      [
        chart.Series(
          'with speculation', steps, [x['step_secs'] for x in records]
        ),
        chart.Series(
          'without',
          [x['step'] for x in measured],
          [x['plain_step_secs'] for x in measured],
        ),
      ],
      'steps',
      'seconds, without compilation of rollouts',
      from_zero=True,
    ),
    chart.Curve(
      'Acceptance',
      [
        chart.Series(
          'tokens per target pass',
          steps,
          [x['acceptance_length'] for x in records],
        )
      ],
      'steps',
      'tokens per target pass',
      from_zero=True,
    ),
  ]


def _losses(
  line: Line, label: str, folder: pathlib.Path, *, by: str, more: float = 0.0
) -> chart.Series:
  """Validation losses of a run by tokens or FLOPs."""
  result = line.result(folder)
  scale = 1.0 if by == 'tokens' else result['flops'] / result['num_tokens']
  points = metrics.read_metrics(folder, kind='eval')
  return chart.Series(
    label,
    [more + scale * x['tokens'] for x in points],
    [x['loss'] for x in points],
  )


def _samples(line: Line) -> Sequence[sections.Section]:
  found = line.result('islands').get('samples')
  if not found:
    return ()
  samples = [sections.Sample(x['text'], prompt=x['prompt']) for x in found]
  return (sections.Samples(samples, title='What it writes, before reasoning'),)


def _times(result: Mapping[str, Any]) -> sections.Section:
  rows = [
    (name.replace('_', ' '), units.format_duration(secs))
    for name, secs in result['stages'].items()
  ]
  return sections.Table('Stages', ('stage', 'time'), rows)
