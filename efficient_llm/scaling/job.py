"""From a file of runs to a prediction, its report and advice.

Over 300 lines: what is said of a prediction, beside how it comes about.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from efficient_llm.scaling import (
  allocation,
  auto,
  checks,
  data,
  fit,
  own_runs,
  plan_report,
  planner,
  plots,
  sweep,
)
from efficient_llm.scaling.config import ScalingConfig
from efficient_llm.training import report, sections, units

_MOST_FAMILIES = 8
_NAMES = ('E', 'A', 'B', 'alpha', 'beta')
_PATH = 9


@dataclasses.dataclass(frozen=True)
class Answer:
  """What is said of one family."""

  name: str
  seen: data.Runs
  target: data.Runs
  prediction: auto.Prediction
  held_out: dict[str, float] | None
  warnings: list[str]
  plain: fit.Fits

  def as_dict(self) -> dict[str, Any]:
    """For result.json."""
    p = self.prediction
    return {
      'family': self.name,
      'num_rows': len(self.seen),
      'num_sizes': len(self.seen.sizes),
      'num_params': float(self.target.num_params[-1]),
      'num_tokens': float(self.target.num_tokens[-1]),
      'loss': float(p.loss[-1]),
      'low': float(p.low[-1]),
      'high': float(p.high[-1]),
      'level': p.level,
      'law': dict(zip(_NAMES, p.constants.tolist(), strict=True)),
      'law_without_prior': dict(
        zip(_NAMES, self.plain.constants[0].tolist(), strict=True)
      ),
      'weights': {str(way): weight for way, weight in p.weights.items()},
      'backtest': {str(way): error for way, error in p.backtest.items()},
      'held_out': self.held_out,
      'noise': planner.noise_of(self.seen),
      'warnings': self.warnings,
    }


def run(
  config: ScalingConfig,
  *,
  workdir: pathlib.Path,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Predicts or plans, and writes result.json and report.html.

  Args:
    config: What.
    workdir: Where to.
    say: Shows progress.
  Returns:
    What result.json holds.
  Raises:
    ValueError: If the rows are bad or cannot carry a law.
  """
  runs = _read(config)
  if runs is not None and config.runs:
    for bad in runs.bad_rows:
      say(f'Left out: {bad.line} {bad.reason}.')
  elif runs is not None and runs.bad_rows:
    say(f'{len(runs.bad_rows)} bad rows were left out.')
  if config.mode == 'plan':
    if runs is not None and config.runs and len(runs.by_family()) > 1:
      raise ValueError(
        f'runs={config.runs} are on several texts; set rows.family to one of '
        f'{", ".join(runs.by_family())}.'
      )
    target = None if runs is None else target_of(runs, config)
    return plan_report.write(config, runs, target, workdir=workdir)
  if runs is None:
    raise ValueError(
      'There is nothing to fit; set --config.data=FILE (CSV, JSONL, Parquet) '
      "or --config.runs='DIR/*/result.json'."
    )
  families = runs.by_family()
  if len(families) > _MOST_FAMILIES:
    raise ValueError(
      f'{len(families)} families are more than {_MOST_FAMILIES} at a time; set '
      f'rows.family to one of {", ".join(list(families)[:20])}.'
    )
  answers = []
  for name, rows in families.items():
    say(f'{name}: {len(rows)} rows, {len(rows.sizes)} sizes')
    answers.append(answer(name, rows, config))
  duels = [
    {
      'a': a.name,
      'b': b.name,
      'probability_a_better': planner.probability_better(
        a.prediction, b.prediction
      ),
    }
    for i, a in enumerate(answers)
    for b in answers[i + 1 :]
    # Own runs are of several texts then, whose losses are not to be compared.
    if _alike(a.target, b.target) and not config.runs
  ]
  result = {
    'predictions': [one.as_dict() for one in answers],
    'a_or_b': duels,
    'bad_rows': [dataclasses.asdict(bad) for bad in runs.bad_rows],
    'config': dataclasses.asdict(config),
  }
  parts: list[sections.Section] = []
  for number, one in enumerate(answers, 1):
    say(f'{one.name}: pictures')
    # Not by its name, which may be a path.
    several = len(answers) > 1
    folder = workdir / 'plots' / (str(number) if several else '')
    parts += _sections(one, config, folder, several)
  if duels:
    parts.append(
      sections.Table(
        'A or B',
        ('A', 'B', 'chance that A is better'),
        [[d['a'], d['b'], d['probability_a_better']] for d in duels],
        note='At the common target, errors of both taken as independent.',
      )
    )
  if runs.bad_rows:
    parts.append(
      sections.Table(
        'Rows left out',
        ('run' if config.runs else 'line', 'why'),
        [[bad.line, bad.reason] for bad in runs.bad_rows[:200]],
      )
    )
  parts.append(sections.Configuration(dataclasses.asdict(config)))
  report.write_result(workdir, result)
  report.write_report(workdir, title='Scaling laws', sections=parts)
  return result


def answer(name: str, seen: data.Runs, config: ScalingConfig) -> Answer:
  """Predicts one family's target, and its largest model as a test.

  Args:
    name: Of the family.
    seen: Its rows.
    config: What to predict.
  Raises:
    ValueError: If the rows cannot carry a law.
  """
  if reason := checks.refusal(seen):
    raise ValueError(f'{name}: {reason}')
  target = target_of(seen, config)
  target = _path(seen, target)
  prediction = auto.predict(seen, target)
  plain = fit.solve([sweep.problem_of(seen)])
  held_out = None
  if len(seen.sizes) >= 3:
    below = seen.where(seen.num_params < seen.sizes[-1])
    largest = sweep.target_of(seen)
    guess = auto.predict(below, largest)
    flat = np.full(len(largest), sweep.best_seen(below))
    held_out = {
      'num_params': float(seen.sizes[-1]),
      'are': sweep.relative_error(guess.loss, largest),
      'best_seen_are': sweep.relative_error(flat, largest),
      'inside_interval': float(
        np.mean((guess.low <= largest.loss) & (largest.loss <= guess.high))
      ),
    }
  warnings = checks.warnings(seen, target, prediction, plain)
  return Answer(name, seen, target, prediction, held_out, warnings, plain)


def target_of(seen: data.Runs, config: ScalingConfig) -> data.Runs:
  """The model to predict: one row, at the end of its training.

  Args:
    seen: Rows of the family.
    config: Sizes and tokens; what is None follows from the rows.
  """
  largest = seen.where(seen.num_params == seen.sizes[-1])
  size = config.target_params or 10 * float(seen.sizes[-1])
  per_parameter = largest.num_tokens.max() / seen.sizes[-1]
  tokens = config.target_tokens or per_parameter * size
  unique = np.nan
  if np.isfinite(largest.unique_tokens).any():
    unique = np.nanmax(largest.unique_tokens)
  return data.make(
    size, tokens, np.nan, run='target', unique_tokens=np.array([unique])
  )


def _path(seen: data.Runs, target: data.Runs) -> data.Runs:
  """Models between the largest one seen and the target, which comes last."""
  largest = seen.where(seen.num_params == seen.sizes[-1])
  place = np.linspace(0, 1, _PATH)
  size, tokens = (
    np.exp(np.interp(place, [0, 1], np.log([start, float(end[0])])))
    for start, end in (
      (float(seen.sizes[-1]), target.num_params),
      (float(largest.num_tokens.max()), target.num_tokens),
    )
  )
  return data.make(
    size,
    tokens,
    np.full(_PATH, np.nan),
    # Each at the end of its own run.
    run=[f'target {i}' for i in range(_PATH)],
    unique_tokens=np.full(_PATH, target.unique_tokens[0]),
  )


def _alike(a: data.Runs, b: data.Runs) -> bool:
  return bool(
    a.num_params[-1] == b.num_params[-1]
    and a.num_tokens[-1] == b.num_tokens[-1]
  )


def _read(config: ScalingConfig) -> data.Runs | None:
  if config.runs:
    return own_runs.read(config.runs, family=config.rows.family)
  return data.read(config.data, config.rows) if config.data else None


def _sections(
  one: Answer, config: ScalingConfig, folder: pathlib.Path, several: bool
) -> list[sections.Section]:
  p = one.prediction
  law = dict(zip(_NAMES, p.constants.tolist(), strict=True))
  tiles = [
    sections.Tile(
      'Predicted loss',
      f'{p.loss[-1]:.3f}',
      'nats per token',
      f'{p.level:.0%} interval {p.low[-1]:.3f} to {p.high[-1]:.3f}',
    ),
    sections.Tile(
      'Target',
      units.format_count(one.target.num_params[-1]),
      'parameters',
      f'{units.format_count(one.target.num_tokens[-1])} tokens',
    ),
    sections.Tile('Best loss seen', f'{sweep.best_seen(one.seen):.3f}', 'nats'),
  ]
  if one.held_out:
    tiles.append(
      sections.Tile(
        'Largest model, held out',
        f'{one.held_out["are"]:.2f}',
        '% error',
        f'best loss seen: {one.held_out["best_seen_are"]:.2f} %',
      )
    )
  best = allocation.optimal(p.constants, float(one.target.flops[-1]))
  advice = [*one.warnings]
  if all(math.isfinite(value) for value in best):
    advice.append(
      f'By this law the best model for {one.target.flops[-1]:.2g} FLOPs has '
      f'{units.format_count(best[0])} parameters on '
      f'{units.format_count(best[1])} tokens.'
    )
  sampled = plots.bootstrap(
    one.seen, num_samples=config.num_bootstraps, seed=config.seed
  )
  pictures: list[plots.Picture | None] = [
    plots.loss_by_compute(one.seen, one.target, p),
    plots.residuals(one.seen, p.constants),
    plots.exponents(sampled.constants),
    plots.isoflops(one.seen),
  ]
  if len(one.seen.sizes) >= 3:
    pictures.append(_heat_map(one.seen, config))
  drawn = [picture for picture in pictures if picture is not None]
  for picture in drawn:
    picture.save(folder)
  return [
    sections.KeyNumbers(tiles, title=one.name if several else ''),
    sections.Text('Advice', '\n\n'.join(advice)),
    *drawn,
    sections.Table(
      'Law',
      ('constant', 'with prior', 'without'),
      [
        [name, law[name], float(plain)]
        for name, plain in zip(_NAMES, one.plain.constants[0], strict=True)
      ],
      note='E + A / N^alpha + B / D^beta in nats; the prediction also weighs '
      'residuals and other cuts, below.',
    ),
    sections.Table(
      'Ways to use the rows',
      ('way', 'weight', 'error on the largest models seen, %'),
      [
        [str(way), weight, 100 * p.backtest[way] if p.backtest else None]
        for way, weight in p.weights.items()
      ],
    ),
  ]


def _heat_map(seen: data.Runs, config: ScalingConfig) -> plots.Picture | None:
  settings, title = config.sweep, 'ARE of the guide'
  if not len(list(sweep.cells(seen, settings))):
    settings = dataclasses.replace(settings, min_tokens=0.0)
    title = 'ARE of the guide, without its cut at 10 B tokens'
  found = sweep.heat_map(seen, settings)
  return plots.heat_map(found, title=title) if found.num_models else None
