"""What runs of growth say together: savings by pair and method, pictures."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from efficient_llm.ligo import ledger
from efficient_llm.training import chart, sections

_Record = Mapping[str, Any]
# Student's t for 95 %, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
# Wider than it must be beyond.
_T_BEYOND = 2.306


def summary(
  records: Sequence[_Record], *, candidates: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
  """The result of the benchmark.

  Args:
    records: Of scratch runs, small models, arms and controls.
    candidates: Methods that `auto` tries, by pair.
  """
  scratch = {x['seed']: x for x in records if x['name'] == 'scratch'}
  smalls = {(x['pair'], x['seed']): x for x in records if x['name'] == 'small'}
  arms = [x for x in records if 'function_error' in x]
  by_pair = _rows(arms, scratch, smalls, candidates)
  best = {pair: _best(rows) for pair, rows in by_pair.items()}
  regrets = {
    pair: 100
    * (best[pair]['saving'] - by_pair[pair]['auto']['warm_flops_saving'])
    for pair in candidates
  }
  errors = [x['function_error'] for x in arms if x['claimed']]
  ligo = by_pair.get('depth', {}).get('ligo', {})
  return {
    'ligo_depth_warm_flops_saving': ligo.get('warm_flops_saving'),
    'ligo_depth_warm_seconds_saving': ligo.get('warm_seconds_saving'),
    'best_warm_flops_saving': best,
    'auto_regret_points': max(regrets.values()) if regrets else None,
    'auto_regret_points_by_pair': regrets,
    'max_preservation_error': max(errors) if errors else None,
    'pairs': by_pair,
    'scratch_losses': {seed: x['losses'][-1] for seed, x in scratch.items()},
    'controls': {
      x['name']: {'seed': x['seed'], 'loss': x['losses'][-1]}
      for x in records
      if x['name'].startswith('scratch_')
    },
    'small_losses': {
      f'{pair}, seed {seed}': x['losses'][-1]
      for (pair, seed), x in smalls.items()
    },
  }


def _rows(
  arms: Sequence[_Record],
  scratch: Mapping[int, _Record],
  smalls: Mapping[tuple[str, int], _Record],
  candidates: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, Any]]:
  """By pair and method, `auto` among them."""
  records = {(x['pair'], x['name'], x['seed']): x for x in arms}
  savings = {
    key: _savings(x, scratch[x['seed']], smalls[x['pair'], x['seed']])
    for key, x in records.items()
  }
  for pair, names in candidates.items():
    for seed in scratch:
      tried = {name: records[pair, name, seed] for name in names}
      savings[pair, 'auto', seed] = _auto(
        tried, scratch[seed], smalls[pair, seed]
      )
  by_pair: dict[str, dict[str, Any]] = {}
  for pair, name, _ in savings:
    found = [x for key, x in sorted(savings.items()) if key[:2] == (pair, name)]
    by_pair.setdefault(pair, {})[name] = _row(found)
  return by_pair


def _best(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The fixed method that saves most, among those compared at one loss."""
  fixed = {
    name: row
    for name, row in rows.items()
    if name != 'auto' and row['warm_flops_saving'] is not None
  }
  reached = {name: row for name, row in fixed.items() if row['reached'] == 1}
  name = max(
    reached or fixed, key=lambda name: fixed[name]['warm_flops_saving']
  )
  return {
    'method': name,
    'saving': fixed[name]['warm_flops_saving'],
    'reached': fixed[name]['reached'],
  }


def _savings(arm: _Record, scratch: _Record, small: _Record) -> dict[str, Any]:
  """Of one run against scratch of the same seed."""
  by_steps = ledger.saving(
    ledger.Curve(arm['steps'], arm['losses']),
    ledger.Curve(scratch['steps'], scratch['losses']),
    operator=arm['operator_steps'],
    small=small['cost_steps'],
  )
  by_secs = ledger.saving(
    ledger.Curve(arm['secs'], arm['losses']),
    ledger.Curve(scratch['secs'], scratch['losses']),
    operator=arm['operator_secs'],
    small=small['secs'][-1],
  )
  return {
    'warm_flops_saving': None if by_steps is None else by_steps.warm,
    'cold_flops_saving': None if by_steps is None else by_steps.cold,
    'warm_seconds_saving': None if by_secs is None else by_secs.warm,
    'reached': by_steps is not None and by_steps.reached,
    'preservation_error': arm['function_error'],
    'claims_to_preserve': arm['claimed'],
    'operator_steps': arm['operator_steps'],
    'grown_loss': arm['losses'][0],
    'last_loss': arm['losses'][-1],
  }


def _auto(
  tried: Mapping[str, _Record], scratch: _Record, small: _Record
) -> dict[str, Any]:
  """The best trial goes on; what the others took counts as the operator."""
  name = min(tried, key=lambda n: tried[n]['probe_loss'])
  chosen = dict(tried[name])
  for other in tried:
    if other == name:
      continue
    x = tried[other]
    chosen['operator_steps'] += x['operator_steps'] + x['probe_steps']
    chosen['operator_secs'] += x['operator_secs'] + x['probe_secs']
  return {**_savings(chosen, scratch, small), 'chosen': name}


def _row(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Means over seeds."""
  row: dict[str, Any] = {}
  for key in ('warm_flops_saving', 'cold_flops_saving', 'warm_seconds_saving'):
    values = [x[key] for x in found if x[key] is not None]
    row[key] = statistics.mean(values) if len(values) == len(found) else None
    if key == 'warm_flops_saving':
      row['ci95'] = _interval(values)
      row['by_seed'] = values
  row['reached'] = statistics.mean(float(x['reached']) for x in found)
  row['preservation_error'] = max(x['preservation_error'] for x in found)
  row['claims_to_preserve'] = found[0]['claims_to_preserve']
  for key in ('operator_steps', 'grown_loss', 'last_loss'):
    row[key] = statistics.mean(x[key] for x in found)
  if 'chosen' in found[0]:
    row['chosen'] = [x['chosen'] for x in found]
  return row


def _interval(values: Sequence[float]) -> list[float] | None:
  if len(values) < 2:
    return None
  mean = statistics.mean(values)
  width = _T.get(len(values) - 1, _T_BEYOND) * statistics.stdev(values)
  width /= math.sqrt(len(values))
  return [mean - width, mean + width]


def pictures(
  records: Sequence[_Record], table: Mapping[str, Any]
) -> list[sections.Section]:
  """Tables and learning curves for the page."""
  shown: list[sections.Section] = []
  columns = (
    'warm_flops_saving',
    'warm_seconds_saving',
    'cold_flops_saving',
    'reached',
    'operator_steps',
    'grown_loss',
    'last_loss',
    'preservation_error',
  )
  for pair, rows in table['pairs'].items():
    order = sorted(rows, key=lambda n: -(rows[n]['warm_flops_saving'] or -1))
    shown.append(
      sections.Table(
        f'Grown in {pair}',
        ('method', *(column.replace('_', ' ') for column in columns)),
        [[name, *(rows[name][column] for column in columns)] for name in order],
        note='Means over seeds; an operator in steps of the large model.',
      )
    )
    curves = [
      x
      for x in records
      if x['seed'] == 0
      and (
        x['name'] == 'scratch'
        or (x.get('pair') == pair and x['name'] != 'small')
      )
    ]
    shown.append(
      chart.Curve(
        f'Losses of seed 0, grown in {pair}',
        [chart.Series(x['name'], x['steps'], x['losses']) for x in curves],
        'steps of the large model, the operator aside',
        'nats a byte',
      )
    )
  return shown
