"""How well the largest model of a family is predicted from the smaller ones.

Over 300 lines: four predictions and what judges them.

    ./run.sh python -m benchmarks.scaling_accuracy [--data=DIR] [--quick]

For every published family with three or more sizes, the absolute relative error
(ARE, percent) on the last 30 % of the largest model's training:
  auto              `scaling.auto`; its prior is learned without the family and
                    all that share models with it (published.group_of)
  guide             the guide's fit: checkpoints above 10 B tokens (all, where
                    that leaves fewer than two sizes), squares, one start
  huber_multistart  the same rows, Huber's loss of logarithms, global optimum
  best_seen         the lowest loss of the smaller models
At the top level:
  auto_median, guide_median, huber_median, best_seen_median   over families
  auto_loses          families where auto is more than a point behind best_seen
  coverage90          share of the largest models' last losses inside the 90 %
                      interval, over families and cut-offs (all sizes or half of
                      them, 30, 65 and 100 % of the training); calibrated
                      without the family and those that share models with it
  coverage90_families  the same, every family with the same weight
  one_model_median    ARE from one smaller model alone with that prior, the
                      nearest one, over families with two or more sizes
  one_model_every     the same over every smaller model with five checkpoints
A guide's fit that fails or is not finite counts as 100 %.
--constants prints the prior and the calibration of all families, which are the
defaults of `scaling.borrow` and `scaling.intervals`.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import harness
from efficient_llm.scaling import (
  auto,
  borrow,
  data,
  fit,
  intervals,
  posterior,
  published,
  repeated,
  sweep,
)
from efficient_llm.training import sections

_SHARES = (0.3, 0.65, 1.0)
_MIN_CHECKPOINTS = 5
# Intervals do not matter where only the prediction is asked for.
NO_INTERVALS = intervals.Calibration(0.9, 1.0, 1.0)


def learned(families: Mapping[str, data.Runs]) -> dict[str, Any]:
  """Constants of every family under the wide prior.

  Args:
    families: By name.
  """
  found = {}
  for name, runs in families.items():
    if len(runs.sizes) < 3:
      continue
    if repeated.is_repeated(runs):
      runs = repeated.effective(runs)
    below = runs.where(runs.num_params < runs.sizes[-1])
    reference = posterior.Reference.of(below)
    found[name] = posterior.posterior(runs, reference, borrow.WIDE)
  return found


def priors_without(
  known: Mapping[str, Any], groups: Mapping[str, str]
) -> dict[str, borrow.Prior]:
  """By group of families, the prior that the others give.

  Args:
    known: From `learned`.
    groups: Of each family.
  """
  return {
    group: borrow.learn(known, groups, without=[group])
    for group in set(groups.values())
  }


def baselines(
  families: Mapping[str, data.Runs],
) -> dict[str, dict[str, float]]:
  """ARE of the guide, of Huber's loss and of the best loss seen, by family.

  Args:
    families: By name.
  """
  problems, found = [], {}
  for name, runs in families.items():
    below, target = split(runs)
    rows = below.where(below.num_tokens > sweep.GUIDE.min_tokens)
    if len(rows.sizes) < 2:
      rows = below
    # The guide's cut at 100 % is strict.
    rows = rows.where(rows.num_tokens < rows.num_tokens.max())
    problems.append(sweep.problem_of(rows))
    flat = np.full(len(target), sweep.best_seen(below))
    found[name] = {
      'guide': _error(sweep.guide_fit(rows), target),
      'best_seen': sweep.relative_error(flat, target),
    }
  fits = fit.solve(problems, loss='huber')
  for name, constants in zip(found, fits.constants, strict=True):
    found[name]['huber_multistart'] = _error(
      constants, split(families[name])[1]
    )
  return found


def split(runs: data.Runs) -> tuple[data.Runs, data.Runs]:
  """All smaller models, and the end of the largest.

  Args:
    runs: Of a family.
  """
  return runs.where(runs.num_params < runs.sizes[-1]), sweep.target_of(runs)


def _error(constants: np.ndarray | None, target: data.Runs) -> float:
  if constants is None:
    return 100.0
  predicted = fit.predict(constants, target.num_params, target.num_tokens)
  error = sweep.relative_error(predicted, target)
  return error if np.isfinite(error) else 100.0


def ratios(
  families: Mapping[str, data.Runs], priors: Mapping[str, borrow.Prior]
) -> list[dict[str, Any]]:
  """Errors over standard deviations, for every family and cut-off.

  Args:
    families: By name.
    priors: By group.
  """
  rows = []
  for name, runs in families.items():
    below, target = split(runs)
    last = target.where(target.num_tokens == target.num_tokens.max())
    counts = {len(below.sizes), max(2, len(below.sizes) // 2)}
    for count in sorted(counts):
      for share in _SHARES:
        most = below.num_tokens.max()
        seen = below.where(
          (below.num_params >= below.sizes[-count])
          & (below.num_tokens <= share * most)
        )
        if len(seen.sizes) < 2:
          continue
        group = published.group_of(name)
        guess = auto.predict(
          seen, last, prior=priors[group], calibration=NO_INTERVALS
        )
        truth = float(np.mean(np.log(last.loss)))
        mean = float(np.mean(np.log(guess.loss)))
        rows.append(
          {
            'family': name,
            'group': group,
            'num_sizes': count,
            'share': share,
            'error': truth - mean,
            'deviation': float(np.mean(guess.deviation)),
            'tested': bool(guess.backtest),
          }
        )
    say(f'intervals: {name}')
  return rows


def coverage(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
  """Share of targets held: over all, over families; median half-width.

  Args:
    rows: Of `ratios`; 'held' and 'reach' are added.
  """
  for group in {row['group'] for row in rows}:
    calibration = calibrated(rows, without=group)
    for row in rows:
      if row['group'] == group:
        row['reach'] = calibration.factor(row['tested']) * row['deviation']
        row['held'] = bool(abs(row['error']) <= row['reach'])
  held = [row['held'] for row in rows]
  families = {row['family'] for row in rows}
  each = [
    np.mean([row['held'] for row in rows if row['family'] == name])
    for name in families
  ]
  width = float(np.median([row['reach'] for row in rows]))
  return float(np.mean(held)), float(np.mean(each)), 100 * width


def calibrated(
  rows: list[dict[str, Any]], *, without: str | None = None
) -> intervals.Calibration:
  """The factors that the other groups' errors ask for.

  Args:
    rows: Of `ratios`.
    without: A group to leave out.
  """
  others = [row for row in rows if row['group'] != without]
  return intervals.calibrate(
    [row['error'] / row['deviation'] for row in others],
    [row['tested'] for row in others],
    [row['family'] for row in others],
  )


def one_model(
  families: Mapping[str, data.Runs], priors: Mapping[str, borrow.Prior]
) -> list[dict[str, Any]]:
  """ARE on the largest model from one smaller one.

  Args:
    families: By name.
    priors: By group.
  """
  rows = []
  for name, runs in families.items():
    below, target = split(runs)
    for size in below.sizes:
      seen = below.where(below.num_params == size)
      if len(np.unique(seen.num_tokens)) < _MIN_CHECKPOINTS:
        continue
      guess = auto.predict(
        seen,
        target,
        prior=priors[published.group_of(name)],
        calibration=NO_INTERVALS,
      )
      rows.append(
        {
          'family': name,
          'num_params': float(size),
          'times_larger': float(runs.sizes[-1] / size),
          'error': sweep.relative_error(guess.loss, target),
        }
      )
    say(f'one model: {name}')
  return rows


def say(line: str) -> None:
  """Shows how far a benchmark is.

  Args:
    line: To show.
  """
  print(line, file=sys.stderr, flush=True)


def _picture(rows: Mapping[str, Mapping[str, float]]) -> list[sections.Section]:
  names = ('auto', 'guide', 'huber_multistart', 'best_seen')
  table = [
    [family, *(row[name] for name in names)] for family, row in rows.items()
  ]
  return [sections.Table('ARE, percent', ('family', *names), table)]


def main() -> None:
  """Predicts every family four ways."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--data', type=pathlib.Path, default=published.DEFAULT_FOLDER
  )
  parser.add_argument('--quick', action='store_true', help='five families')
  parser.add_argument('--constants', action='store_true', help='print them')
  arguments = parser.parse_args()
  start = time.perf_counter()
  every = published.families(arguments.data)
  families = {k: v for k, v in every.items() if len(v.sizes) >= 3}
  known = learned(families)
  groups = {name: published.group_of(name) for name in every}
  priors = priors_without(known, groups)
  if arguments.quick:
    families = dict(list(families.items())[::8])
    every = families
  rows = baselines(families)
  for name, runs in families.items():
    below, target = split(runs)
    prior = priors[groups[name]]
    guess = auto.predict(below, target, prior=prior, calibration=NO_INTERVALS)
    rows[name]['auto'] = sweep.relative_error(guess.loss, target)
    say(f'{name}: {rows[name]}')
  errors = ratios(families, priors)
  held, held_families, width = coverage(errors)
  if arguments.constants:
    print(borrow.learn(known, groups), calibrated(errors))
  singles = one_model(
    {k: v for k, v in every.items() if len(v.sizes) >= 2}, priors
  )
  nearest = {row['family']: row['error'] for row in singles}

  def median(name: str) -> float:
    return float(np.median([row[name] for row in rows.values()]))

  name = 'scaling_accuracy_quick' if arguments.quick else 'scaling_accuracy'
  harness.record(
    name,
    {
      'auto_median': median('auto'),
      'guide_median': median('guide'),
      'huber_median': median('huber_multistart'),
      'best_seen_median': median('best_seen'),
      'auto_loses': [
        name for name, row in rows.items() if row['auto'] > row['best_seen'] + 1
      ],
      'coverage90': held,
      'coverage90_families': held_families,
      'half_width_median_percent': width,
      'num_intervals': len(errors),
      'one_model_median': float(np.median(list(nearest.values()))),
      'one_model_every': float(np.median([row['error'] for row in singles])),
      'num_families': len(rows),
      'families': rows,
      'one_model': singles,
      'intervals': errors,
      'seconds': time.perf_counter() - start,
    },
  )
  harness.picture(name, 'Predicting the largest model', _picture(rows))


if __name__ == '__main__':
  main()
