"""The default prediction: several ways to use the rows, weighed by backtests.

A way is a cut (checkpoints with fewer tokens than a share of the target's are
left out), with or without residuals that hang together (`posterior`), and the
constant "nothing improves" (the best loss seen). Each first predicts the
largest models that were seen, from those below them; its weight in the answer
is the inverse cube of its error there. With fewer than three sizes there is
nothing to test on, and the law with its prior speaks.

Nothing is chosen on the target: of its rows only sizes, tokens and the place in
the run are read, which are known before it is trained. Prior and calibration
come from other families.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from efficient_llm.scaling import (
  borrow,
  data,
  intervals,
  posterior,
  repeated,
  sweep,
)

CUTS = (0.0, 0.03, 0.1, 0.3)
_NUM_ORIGINS = 2
_POWER = 3
# Errors below this are luck: 0.2 %, what seeds make (datablations' repeats).
_LUCK = 0.002
# What a law is off by where that cannot be tested.
MISFIT = 0.01


@dataclasses.dataclass(frozen=True)
class Way:
  """How rows are used.

  Attributes:
    cut: Share of the target's tokens below which rows are left out; None for
      the best loss seen.
    correlated: Whether residuals hang together.
  """

  cut: float | None
  correlated: bool = False

  def __str__(self) -> str:
    if self.cut is None:
      return 'best loss seen'
    kind = 'law and residuals' if self.correlated else 'law'
    return f'{kind}, from {self.cut:.0%} of the target tokens on'


WAYS = (
  *(Way(cut, correlated) for cut in CUTS for correlated in (False, True)),
  Way(None),
)
_FIRST = Way(0.0)


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Loss of rows that nobody has trained.

  Attributes:
    loss: In nats.
    low: Lower end of the interval.
    high: Upper end.
    level: How many of a hundred intervals should hold the loss, as a share.
    deviation: Of log loss, before calibration.
    weights: Of each way.
    backtest: Mean relative error of each way on the largest models seen; empty
      where there are too few.
    constants: E, A, B, alpha, beta of the law with the largest weight.
    gamma: What the middle of a schedule adds to log L there.
    is_repeated: Whether tokens and parameters count at what they are worth.
  """

  loss: np.ndarray
  low: np.ndarray
  high: np.ndarray
  level: float
  deviation: np.ndarray
  weights: dict[Way, float]
  backtest: dict[Way, float]
  constants: np.ndarray
  gamma: float
  is_repeated: bool


def predict(
  seen: data.Runs,
  target: data.Runs,
  *,
  prior: borrow.Prior | None = None,
  calibration: intervals.Calibration | None = None,
) -> Prediction:
  """Predicts rows from others of the same family.

  Args:
    seen: What was trained.
    target: What was not: sizes, tokens, runs; losses are not read.
    prior: Of the constants; by default that of the published families.
    calibration: Of intervals; by default that of the published families.
  Raises:
    ValueError: If there are no rows.
  """
  if not len(seen) or not len(target):
    raise ValueError('There must be rows to learn from and rows to predict.')
  prior = prior or borrow.published()
  calibration = calibration or intervals.PUBLISHED
  again = repeated.is_repeated(seen)
  if again:
    seen, target = repeated.effective(seen), repeated.effective(target)
  backtest = _backtest(seen, prior)
  now = _forecasts(seen, target, prior, tuple(backtest) or (_FIRST,))
  weights = {
    way: 1.0 if not backtest else (backtest[way] + _LUCK) ** -_POWER
    for way in now
  }
  total = sum(weights.values())
  weights = {way: weight / total for way, weight in weights.items()}
  mean = sum(weights[way] * now[way].mean for way in now)
  spread = sum(
    weights[way] * (now[way].deviation ** 2 + (now[way].mean - mean) ** 2)
    for way in now
  )
  tested = sum(weights[way] * backtest[way] ** 2 for way in now if backtest)
  deviation = np.sqrt(np.asarray(spread) + (tested or MISFIT**2))
  mean = np.asarray(mean)
  reach = calibration.factor(bool(backtest)) * deviation
  best = max(
    (way for way in now if way.cut is not None), key=lambda way: weights[way]
  )
  return Prediction(
    np.exp(mean),
    np.exp(mean - reach),
    np.exp(mean + reach),
    calibration.level,
    deviation,
    weights,
    backtest,
    now[best].constants,
    now[best].gamma,
    again,
  )


def _backtest(seen: data.Runs, prior: borrow.Prior) -> dict[Way, float]:
  """Mean error of log L of each way on the largest models seen."""
  sizes = seen.sizes
  errors: dict[Way, list[float]] = {}
  worst: list[float] = []
  for back in range(1, _NUM_ORIGINS + 1):
    if len(sizes) - back < 2:
      break
    origin = seen.where(seen.num_params <= sizes[-back])
    target = sweep.target_of(origin)
    below = origin.where(origin.num_params < sizes[-back])
    found = {
      way: float(np.mean(np.abs(one.mean - np.log(target.loss))))
      for way, one in _forecasts(below, target, prior, WAYS).items()
    }
    worst.append(max(found.values()))
    for way in WAYS:
      # A way that could not be tried there is taken to be the worst.
      errors.setdefault(way, []).append(found.get(way, worst[-1]))
  return {way: float(np.mean(values)) for way, values in errors.items()}


def _forecasts(
  seen: data.Runs,
  target: data.Runs,
  prior: borrow.Prior,
  ways: Sequence[Way],
) -> dict[Way, posterior.Forecast]:
  """What each way says; ways whose cut leaves too little say nothing."""
  most = target.num_tokens.max()

  @functools.cache
  def law(num_rows: int, correlated: bool) -> posterior.Forecast:
    # Cuts are nested, so as many rows are the same rows.
    kept = np.sort(np.argsort(-seen.num_tokens, kind='stable')[:num_rows])
    return posterior.forecast(
      seen.where(kept), target, prior, correlated=correlated
    )

  found = {}
  for way in ways:
    if way.cut is None:
      flat = np.full(len(target), np.log(sweep.best_seen(seen)))
      none = np.full(5, np.nan)
      found[way] = posterior.Forecast(flat, np.zeros(len(target)), none, 0.0)
      continue
    kept = seen.num_tokens >= way.cut * most
    sizes = len(np.unique(seen.num_params[kept]))
    if way.cut and (kept.sum() < 4 or sizes < min(2, len(seen.sizes))):
      continue
    found[way] = law(int(kept.sum()), way.correlated)
  return found
