"""How far off designs of the scaling planner are, by what it said before.

    ./run.sh python -m benchmarks.scaling_plans [--data=DIR]

For every published family and budgets of 1 to 50 % of the largest model's cost,
the planner chooses among the sets of neighbouring sizes that the budget pays
for, with the first 30 % of the largest model or without, before it sees a loss;
`scaling.auto` then predicts the largest model's last loss from the chosen ones.
What laws are off by is fitted to sets drawn by chance, without the family and
those that share models with it.
  real_over_expected   mean of the ARE over what the planner expected
  inside90             share of AREs below the planner's 90 % limit
  by_share             both for each budget, and the median ARE
  misfit               that of all families, the default of `scaling.misfit`
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import harness, scaling_accuracy
from efficient_llm.scaling import auto, borrow, data, planner, published, sweep
from efficient_llm.scaling import misfit as misfit_lib

# Budgets as shares of the target's cost, what a design has at most, how many
# are judged, and the noise that is taken where none is measured.
_BUDGETS = (0.01, 0.03, 0.1, 0.3, 0.5)
_MOST_SIZES = 6
_MOST_CHOICES = 12
_NOISE = 0.003
# How many choices of each budget say what laws are off by, and what of the
# target may be trained, with how many checkpoints.
_DRAWN = 2
_PARTIAL = 0.3
_MIN_EARLY = 3
# A law that is exact.
_HOLDS = misfit_lib.Misfit(0.0, 0.0, 0.0, 1.0)


def plans(
  families: Mapping[str, data.Runs], priors: Mapping[str, borrow.Prior]
) -> dict[str, Any]:
  """What the planner expects of its choice, and what came of it.

  Args:
    families: By name.
    priors: By group.
  """
  rng = np.random.default_rng(0)
  drawn: list[dict[str, Any]] = []
  for name, runs in families.items():
    affordable = _affordable(runs)
    for share, choices in affordable.items():
      count = min(_DRAWN, len(choices))
      for index in rng.choice(len(choices), count, replace=False):
        drawn.append(_judged(name, runs, priors, choices[index], share))
    scaling_accuracy.say(f'drawn plans: {name}')
  chosen = []
  for name, runs in families.items():
    group = published.group_of(name)
    misfit = _misfit([row for row in drawn if row['group'] != group])
    for share, choices in _affordable(runs).items():
      # Of many sets the dearest: what is saved buys nothing.
      rows = [
        _judged(name, runs, priors, one, share, misfit=misfit, predict=False)
        for one in choices[:_MOST_CHOICES]
      ]
      best = int(np.argmin([row['expected'] for row in rows]))
      chosen.append(
        _judged(name, runs, priors, choices[best], share, misfit=misfit)
      )
    scaling_accuracy.say(f'chosen plans: {name}')
  real, expected, limit = (
    np.array([row[key] for row in chosen])
    for key in ('real', 'expected', 'limit90')
  )
  return {
    'num_plans': len(chosen),
    'num_families': len({row['family'] for row in chosen}),
    'real_over_expected': float(np.mean(real / expected)),
    'inside90': float(np.mean(real <= limit)),
    'expected_median': float(np.median(expected)),
    'real_median': float(np.median(real)),
    'by_share': {
      str(share): {
        'real_over_expected': float(np.mean((real / expected)[at])),
        'inside90': float(np.mean((real <= limit)[at])),
        'real_median': float(np.median(real[at])),
      }
      for share in _BUDGETS
      if any(at := [row['share'] == share for row in chosen])
    },
    'misfit': dataclasses.asdict(_misfit(drawn)),
    'plans': chosen,
    'num_drawn': len(drawn),
  }


def _affordable(runs: data.Runs) -> dict[float, list[data.Runs]]:
  """Rows that each budget pays for, the dearest first.

  Sets of neighbouring sizes below the largest, with and without the first 30 %
  of the largest itself.
  """
  sizes, is_largest = runs.sizes[:-1], runs.num_params == runs.sizes[-1]
  dear = float(runs.flops[is_largest].max())
  most = runs.num_tokens[is_largest].max()
  early = is_largest & (runs.num_tokens <= _PARTIAL * most)
  has_early = len(np.unique(runs.num_tokens[early])) >= _MIN_EARLY
  choices = []
  for first in range(len(sizes)):
    for count in range(1, min(_MOST_SIZES, len(sizes) - first) + 1):
      chosen = np.isin(runs.num_params, sizes[first : first + count])
      cost = float(runs.flops[chosen & runs.is_final].sum())
      choices.append((cost, runs.where(chosen)))
      if has_early:
        choices.append((cost + _PARTIAL * dear, runs.where(chosen | early)))
  choices.sort(key=lambda one: -one[0])
  found = {
    share: [rows for cost, rows in choices if cost <= share * dear]
    for share in _BUDGETS
  }
  return {share: rows for share, rows in found.items() if rows}


def _judged(
  name: str,
  runs: data.Runs,
  priors: Mapping[str, borrow.Prior],
  seen: data.Runs,
  share: float,
  *,
  misfit: misfit_lib.Misfit = misfit_lib.PUBLISHED,
  predict: bool = True,
) -> dict[str, Any]:
  """What is expected of a choice and, if asked for, what came of it."""
  _, target = scaling_accuracy.split(runs)
  last = target.where(target.num_tokens == target.num_tokens.max())
  one = last.where(np.arange(1))
  group = published.group_of(name)
  prior = priors[group]
  # In percent; what `misfit` adds to it is what `planner.judge` adds.
  exact, _ = planner.judge(seen, one, noise=_NOISE, prior=prior, misfit=_HOLDS)
  deviation, apart = exact / 100, misfit_lib.apart(seen, one)
  expected = 100 * float(misfit.expected(deviation, apart))
  row = {
    'family': name,
    'group': group,
    'share': share,
    'sizes': seen.sizes.tolist(),
    'expected': expected,
    'limit90': misfit.limit * expected,
    'deviation': deviation,
    'apart': apart.tolist(),
  }
  if predict:
    guess = auto.predict(
      seen, last, prior=prior, calibration=scaling_accuracy.NO_INTERVALS
    )
    row['real'] = sweep.relative_error(guess.loss, last)
  return row


def _misfit(rows: list[dict[str, Any]]) -> misfit_lib.Misfit:
  return misfit_lib.calibrate(
    [np.log1p(row['real'] / 100) for row in rows],
    [row['deviation'] for row in rows],
    [np.array(row['apart']) for row in rows],
    [row['group'] for row in rows],
  )


def main() -> None:
  """Judges the planner's choices for all families."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--data', type=pathlib.Path, default=published.DEFAULT_FOLDER
  )
  arguments = parser.parse_args()
  start = time.perf_counter()
  every = published.families(arguments.data)
  families = {k: v for k, v in every.items() if len(v.sizes) >= 3}
  groups = {name: published.group_of(name) for name in families}
  priors = scaling_accuracy.priors_without(
    scaling_accuracy.learned(families), groups
  )
  found = plans(families, priors)
  seconds = time.perf_counter() - start
  harness.record('scaling_plans', {**found, 'seconds': seconds})


if __name__ == '__main__':
  main()
