"""Which small models to train so that a large one can be predicted.

A design is a set of runs. What it would be worth is computed before any of it
is trained: the posterior of the constants given rows at those places depends on
where rows are and how noisy, hardly on what they say (optimal design of
experiments, Chaloner and Verdinelli 1995). The law that stands in for the truth
is that of a family, or the centre of the prior. That a law is itself off, and
the more the further ahead it is asked, is what published families showed
(`misfit`).
"""

import dataclasses
import itertools
import math

import numpy as np
from scipy import stats

from efficient_llm.scaling import (
  auto,
  borrow,
  data,
  fit,
  posterior,
)
from efficient_llm.scaling import (
  misfit as misfit_lib,
)

_NUM_CHECKPOINTS = 12
# Of a run's tokens, from where on checkpoints say something (the guide's 10 B
# of typically 100 to 300 B).
_FIRST_CHECKPOINT = 0.1
_RATIOS = (3.0, 10.0, 30.0)
_TOKENS_PER_PARAMETER = (20.0, 100.0)


@dataclasses.dataclass(frozen=True)
class Design:
  """Runs to make.

  Attributes:
    num_params: Sizes, ascending.
    num_tokens: Of each.
    partial_target: Whether the target itself is trained for 30 %.
    flops: In all.
    expected_error: ARE that is to be expected, in percent.
    interval: Half the width of the 90 % interval, in percent.
  """

  num_params: tuple[float, ...]
  num_tokens: tuple[float, ...]
  partial_target: bool
  flops: float
  expected_error: float
  interval: float


def designs(
  *,
  budget_flops: float,
  target_params: float,
  target_tokens: float,
  noise: float,
  prior: borrow.Prior | None = None,
  constants: np.ndarray | None = None,
) -> list[Design]:
  """Designs within a budget, the one that predicts best first.

  Args:
    budget_flops: To spend on all runs.
    target_params: Of the model to predict.
    target_tokens: The same.
    noise: Standard deviation of log loss between equal runs.
    prior: Borrowed knowledge; the wide one borrows nothing.
    constants: E, A, B, alpha, beta that stand in for the truth.
  Raises:
    ValueError: If values are not above 0, or nothing fits the budget.
  """
  for name, value in (
    ('budget_flops', budget_flops),
    ('target_params', target_params),
    ('target_tokens', target_tokens),
    ('noise', noise),
  ):
    if not (math.isfinite(value) and value > 0):
      raise ValueError(f'plan.{name}={value} must be a number above 0; set it.')
  prior = prior or borrow.published()
  target = data.make(target_params, target_tokens, np.nan)
  found = []
  for count, ratio, spread, per, partial in itertools.product(
    (1, 2, 3, 4, 5, 6),
    _RATIOS,
    (2.0, 3.0),
    _TOKENS_PER_PARAMETER,
    (False, True),
  ):
    if count == 1 and spread != 2.0:
      continue
    sizes = target_params / ratio / spread ** np.arange(count)[::-1]
    tokens = np.minimum(per * sizes, target_tokens)
    cost = float(6 * np.sum(sizes * tokens))
    if partial:
      cost += 0.3 * 6 * target_params * target_tokens
    if cost > budget_flops or sizes[0] < 1e5:
      continue
    error, interval = judge(
      _rows(sizes, tokens, target, partial=partial),
      target,
      noise=noise,
      prior=prior,
      constants=constants,
    )
    found.append(
      Design(
        tuple(sizes.tolist()),
        tuple(tokens.tolist()),
        partial,
        cost,
        error,
        interval,
      )
    )
  if not found:
    raise ValueError(
      f'plan.{budget_flops=:.3g} pays for no design: a model 30 times smaller '
      f'than the target costs '
      f'{6 * (target_params / 30) ** 2 * 20:.2g}; raise it.'
    )
  return sorted(found, key=lambda one: (one.expected_error, one.flops))


def cheapest_within(found: list[Design], accuracy: float) -> Design | None:
  """The least expensive design that reaches an accuracy, if any does.

  Args:
    found: Designs.
    accuracy: ARE in percent.
  """
  good = [one for one in found if one.expected_error <= accuracy]
  return min(good, key=lambda one: one.flops) if good else None


def judge(
  rows: data.Runs,
  target: data.Runs,
  *,
  noise: float,
  prior: borrow.Prior,
  constants: np.ndarray | None = None,
  misfit: misfit_lib.Misfit = misfit_lib.PUBLISHED,
) -> tuple[float, float]:
  """What predicting a model from some rows would be worth.

  Args:
    rows: Sizes, tokens and runs to have; losses are not read.
    target: One row, to predict.
    noise: Standard deviation of log loss between equal runs.
    prior: Borrowed knowledge.
    constants: E, A, B, alpha, beta that stand in for the truth; None takes the
      centre of the prior.
    misfit: What laws are off by.
  Returns:
    The expected ARE and half the 90 % interval, in percent.
  """
  if constants is None:
    constants = _typical(
      prior, float(target.num_params[0]), float(target.num_tokens[0])
    )
  loss = fit.predict(constants, rows.num_params, rows.num_tokens)
  rows = dataclasses.replace(rows, loss=loss)
  guess = posterior.forecast(rows, target, prior, correlated=False)
  deviation = math.hypot(guess.deviation[0], noise)
  error = float(misfit.expected(deviation, misfit_lib.apart(rows, target)))
  return 100 * error, 100 * misfit.limit * error


def _typical(
  prior: borrow.Prior, num_params: float, num_tokens: float
) -> np.ndarray:
  # A loss of 3 nats at the reference; only ratios matter.
  reference = posterior.Reference(
    math.log(num_params / 10), math.log(num_tokens), math.log(3.0)
  )
  return posterior.constants_of(prior.mean, reference)


def _rows(
  sizes: np.ndarray, tokens: np.ndarray, target: data.Runs, *, partial: bool
) -> data.Runs:
  """The checkpoints of a design."""
  shares = np.geomspace(_FIRST_CHECKPOINT, 1, _NUM_CHECKPOINTS)
  n = np.repeat(sizes, _NUM_CHECKPOINTS)
  d = np.outer(tokens, shares).ravel()
  if partial:
    n = np.r_[n, np.repeat(target.num_params, _NUM_CHECKPOINTS)]
    d = np.r_[d, 0.3 * target.num_tokens * shares]
  return data.make(n, d, np.full(len(n), np.nan))


def noise_of(runs: data.Runs) -> float | None:
  """Standard deviation of log loss between equal runs, if some are equal.

  Args:
    runs: Of one family.
  """
  final = runs.where(runs.is_final)
  keys = np.stack([final.num_params, final.num_tokens], 1)
  _, place, count = np.unique(
    keys, axis=0, return_inverse=True, return_counts=True
  )
  logs = np.log(final.loss)
  mean = np.bincount(place.ravel(), logs) / count
  if count.sum() == len(count):
    return None
  square = np.sum((logs - mean[place.ravel()]) ** 2)
  return float(np.sqrt(square / (count.sum() - len(count))))


def probability_better(a: auto.Prediction, b: auto.Prediction) -> float:
  """Chance that recipe A ends below recipe B, errors taken as independent.

  Errors that both share, of one law for alike recipes, make the truth more
  certain than this.

  Args:
    a: Prediction of one target.
    b: The other recipe's, of the same target.
  """
  spread = [
    np.log(one.high[-1] / one.loss[-1]) / stats.norm.ppf((1 + one.level) / 2)
    for one in (a, b)
  ]
  apart = np.log(b.loss[-1] / a.loss[-1])
  return float(stats.norm.cdf(apart / np.hypot(*spread)))
