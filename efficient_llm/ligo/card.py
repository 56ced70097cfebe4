"""The growth card: what growing kept, cost and saved, for result and report."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from efficient_llm.ligo import ledger
from efficient_llm.ligo.config import LigoConfig
from efficient_llm.training import metrics, sections, trained_run

FILE_NAME = 'growth.json'
# Runs of models on the way, numbered.
STAGES = 'stages'
# What growing costs besides the large model's own training.
_COSTS = ('operator_flops', 'probe_flops', 'stage_flops', 'teacher_flops')
_PROBE = ('name', 'loss', 'tokens', 'secs')


def describe(
  config: LigoConfig, workdir: pathlib.Path, probes: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], list[sections.Section]]:
  """What result.json and the report say of the growth.

  Args:
    config: The run.
    workdir: Its folder, with the card that was written at growth.
    probes: Trials of methods before it.
  """
  found = json.loads((workdir / FILE_NAME).read_bytes())
  # Of scratch, of trials and of learning an operator, in which no layer rests.
  whole = dataclasses.replace(config, resting_layers=(), sub_model_layers=None)
  flops_per_token = whole.flops_per_token
  found['probes'] = list(probes)
  found['probe_tokens'] = sum(
    probe['tokens'] for probe in probes if not probe['chosen']
  )
  found['probe_flops'] = found['probe_tokens'] * flops_per_token
  found['operator_flops'] = found['operator_tokens'] * flops_per_token
  found['small_flops'] = _flops(_read(config.small))
  stages = [
    _read(folder)
    for folder in sorted(
      (workdir / STAGES).glob('[0-9]*'), key=lambda folder: int(folder.name)
    )
  ]
  found['stage_flops'] = sum(map(_own_flops, stages))
  if stages:
    found['small_flops'] = stages[0]['growth']['small_flops']
  shown: list[sections.Section] = [_table(found, config)]
  if probes:
    rows = [[probe[name] for name in _PROBE] for probe in probes]
    shown.append(
      sections.Table(
        'Trials of methods',
        ('method', 'validation loss', config.unit, 'seconds'),
        rows,
        note='The lowest loss was chosen and is the beginning of the run; the '
        f"others' {config.unit} count as the operator's.",
      )
    )
  if config.scratch:
    grown = curve(
      workdir, config.flops_per_token, first=found.get('grown_loss')
    )
    scratch = curve(pathlib.Path(config.scratch), flops_per_token)
    if grown is not None and scratch is not None:
      saved = _saving(found, grown, scratch)
      found |= saved
      if saved:
        shown.append(_savings_table(saved))
  return {'growth': found}, shown


def check_scratch(config: LigoConfig) -> None:
  """Refuses a run that growing could not be compared with.

  Raises:
    ValueError: Naming what differs.
  """
  if not config.scratch:
    return
  run = trained_run.find(config.scratch, name='scratch')
  if run.model.sizes != config.model.sizes:
    raise ValueError(
      f'scratch={config.scratch} must be of the large model, and has the sizes '
      f'{run.model.sizes}; choose another.'
    )
  for name in ('sequence_length', 'tokenizer', 'objective', 'image_size'):
    ours, theirs = getattr(config.data, name), getattr(run.data, name)
    if ours != theirs:
      raise ValueError(
        f'scratch={config.scratch} has data.{name}={theirs!r}, this run '
        f'{ours!r}; losses cannot be compared, choose another.'
      )
  if not (run.workdir / metrics.FILE_NAME).is_file():
    raise ValueError(
      f'scratch={config.scratch} must hold {metrics.FILE_NAME}; choose another.'
    )


def curve(
  workdir: pathlib.Path, flops_per_token: float, *, first: float | None = None
) -> ledger.Curve | None:
  """Validation losses of a run by FLOPs; None if it made none.

  Args:
    workdir: Its folder.
    flops_per_token: Of its training.
    first: Loss before the first step.
  """
  records = metrics.read_metrics(workdir, kind='eval')
  points = [(x['tokens'], x['loss']) for x in records if 'loss' in x]
  if first is not None and not (points and points[0][0] == 0):
    points = [(0.0, first), *points]
  # One that is not finite may be a string in a file.
  points = [point for point in points if math.isfinite(float(point[1]))]
  if not points:
    return None
  tokens, losses = zip(*points, strict=True)
  return ledger.Curve([x * flops_per_token for x in tokens], losses)


def _saving(
  found: dict[str, Any], grown: ledger.Curve, scratch: ledger.Curve
) -> dict[str, Any]:
  saved = ledger.saving(
    grown,
    scratch,
    operator=sum(found[name] for name in _COSTS),
    small=found['small_flops'],
  )
  if saved is None:
    return {}
  return {
    'compared_at_loss': saved.loss,
    'reached_scratch': saved.reached,
    'warm_flops_saving': saved.warm,
    'cold_flops_saving': saved.cold,
    'break_even_uses': saved.break_even,
  }


def _table(found: dict[str, Any], config: LigoConfig) -> sections.Table:
  reason, unit = found['loss_of_function'], config.unit.removesuffix('s')
  rows = [
    ('method', found['method'], ''),
    ('keeps the function', 'no' if reason else 'yes', reason or ''),
    (
      'largest difference of logits',
      found.get('function_error', 'no validation data'),
      'share of the largest logit',
    ),
    ('steps of the operator', found['operator_steps'], ''),
    ('cost of the operator', found['operator_flops'], 'FLOPs, its map not'),
    ('training of the operator', found['operator_secs'], 'seconds'),
    ('cost of other trials', found['probe_flops'], 'FLOPs'),
    ('cost of models on the way', found['stage_flops'], 'FLOPs'),
    ('cost of the teacher', found['teacher_flops'], 'FLOPs'),
  ]
  for name, what in (
    ('small_loss', 'the small model'),
    ('begun_loss', 'grown, operator not learned'),
    ('grown_loss', 'grown'),
  ):
    if name in found:
      rows.append((f'validation loss: {what}', found[name], f'nats per {unit}'))
  return sections.Table('Growth card', ('what', 'value', 'unit or note'), rows)


def _savings_table(saved: dict[str, Any]) -> sections.Table:
  rows = [(name.replace('_', ' '), value) for name, value in saved.items()]
  return sections.Table(
    'Saved against training from nothing',
    ('what', 'value'),
    rows,
    note='Warm counts operator, trials, models on the way, the teacher and the '
    'large model, cold the small model too; '
    'where scratch is not reached, at the loss that was.',
  )


def _flops(result: dict[str, Any]) -> float | None:
  """Of a run and of all that it grew out of; None where one is unknown."""
  own = result.get('flops')
  if own is None or 'growth' not in result:
    return own
  small = result['growth']['small_flops']
  return None if small is None else small + _own_flops(result)


def _own_flops(result: dict[str, Any]) -> float:
  """Of a run that grew, without the model that it grew out of."""
  return result['flops'] + sum(result['growth'][name] for name in _COSTS)


def _read(folder: str | pathlib.Path) -> dict[str, Any]:
  path = pathlib.Path(folder) / 'result.json'
  return json.loads(path.read_bytes()) if path.is_file() else {}
