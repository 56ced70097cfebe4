"""How far laws were off, by how far ahead they were asked.

A posterior knows what the data leave open if the law holds; that the law itself
is off, it does not know. On published families the error of a prediction grows
with how many times larger the target is than the largest model seen, and how
many times longer it is trained, by a few percent for each factor of e; how many
models were seen matters less. These rates are fitted to predictions whose truth
is known, by the likelihood of errors with heavy tails (Laplace's law, whose
scale is the mean absolute error).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import optimize

from efficient_llm.scaling import data

# Where the search for the rates begins.
_START = (0.01, 0.03, 0.03)


@dataclasses.dataclass(frozen=True)
class Misfit:
  """Errors of log loss that a law makes, for all that its data say.

  Attributes:
    floor: Where the target is as large as the largest model seen, and trained
      as long.
    per_size: More for each factor of e in parameters.
    per_token: More for each factor of e in tokens.
    limit: Times the expected error below which 90 % of errors are.
  """

  floor: float
  per_size: float
  per_token: float
  limit: float

  def expected(
    self, deviation: float | np.ndarray, apart: np.ndarray
  ) -> np.ndarray:
    """The absolute error of log loss to be expected.

    Args:
      deviation: Standard deviation by posterior and noise, [...].
      apart: From `apart`, [..., 2].
    """
    rates = np.array([self.per_size, self.per_token])
    parts = np.sum((rates * apart) ** 2, axis=-1)
    return np.sqrt(np.square(deviation) + self.floor**2 + parts)


def apart(seen: data.Runs, target: data.Runs) -> np.ndarray:
  """Factors of e from the largest model seen to the target, [2].

  Args:
    seen: Rows.
    target: One row.
  Returns:
    Of parameters, and of tokens; not below 0.
  """
  largest = seen.num_params.max()
  tokens = seen.num_tokens[seen.num_params == largest].max()
  factors = np.log(
    [target.num_params[0] / largest, target.num_tokens[0] / tokens]
  )
  return np.maximum(factors, 0.0)


def calibrate(
  errors: Sequence[float] | np.ndarray,
  deviations: Sequence[float] | np.ndarray,
  aparts: Sequence[np.ndarray] | np.ndarray,
  groups: Sequence[str],
) -> Misfit:
  """Rates under which known errors are most likely.

  Args:
    errors: Of log loss, [n].
    deviations: By posterior and noise, [n].
    aparts: From `apart`, [n, 2].
    groups: Families that are no independent draws share one, and its weight.
  """
  error, far = np.abs(np.asarray(errors)), np.asarray(aparts)
  _, place, count = np.unique(
    np.asarray(groups), return_inverse=True, return_counts=True
  )
  weight = 1 / count[place] / len(count)

  def expected(logs: np.ndarray) -> np.ndarray:
    return Misfit(*np.exp(logs), limit=1.0).expected(
      np.asarray(deviations), far
    )

  def cost(logs: np.ndarray) -> float:
    scale = expected(logs)
    return float(np.sum(weight * (np.log(scale) + error / scale)))

  found = optimize.minimize(cost, np.log(_START), method='Nelder-Mead').x
  ratio = error / expected(found)
  order = np.argsort(ratio)
  reached = np.searchsorted(np.cumsum(weight[order]), 0.9)
  limit = ratio[order][min(int(reached), len(ratio) - 1)]
  return Misfit(*np.exp(found).tolist(), limit=float(limit))


# What `python -m benchmarks.scaling_plans` printed.
PUBLISHED = Misfit(floor=0.0092, per_size=0.0331, per_token=0.0278, limit=1.94)
