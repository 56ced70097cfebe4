"""Intervals that hold as often as they say, by what other families showed.

A model of errors is never right, so its standard deviations are multiplied by
the factor with which they would have held on families whose targets are known:
split conformal prediction with normalised residuals (Lei et al. 2018,
section 5.2), a family being a draw.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Factors of standard deviations.

  Attributes:
    level: Share of targets that intervals are to hold.
    tested: Where the prediction was weighed by backtests.
    untested: Where there were too few sizes for that.
  """

  level: float
  tested: float
  untested: float

  def factor(self, was_tested: bool) -> float:
    """That of one prediction.

    Args:
      was_tested: Whether there was a backtest.
    """
    return self.tested if was_tested else self.untested


def calibrate(
  ratios: Sequence[float] | np.ndarray,
  was_tested: Sequence[bool] | np.ndarray,
  groups: Sequence[str],
  *,
  level: float = 0.9,
) -> Calibration:
  """Finds the factors that hold on known targets.

  Args:
    ratios: Errors of log loss over their standard deviations.
    was_tested: Whether each prediction was.
    groups: Families that are no independent draws share one, and its weight.
    level: Share to hold.
  Raises:
    ValueError: If a kind of prediction has no example.
  """
  ratio, tested = np.abs(np.asarray(ratios)), np.asarray(was_tested)
  group = np.asarray(groups)
  factors = []
  for kind in (True, False):
    mine = tested == kind
    if not mine.any():
      raise ValueError('Both kinds of prediction must have examples.')
    names, place, count = np.unique(
      group[mine], return_inverse=True, return_counts=True
    )
    weight = 1 / count[place] / len(names)
    order = np.argsort(ratio[mine])
    reached = np.cumsum(weight[order])
    at = min(int(np.searchsorted(reached, level)), len(order) - 1)
    factors.append(float(ratio[mine][order][at]))
  return Calibration(level, *factors)


# What `python -m benchmarks.scaling_accuracy --constants` printed.
PUBLISHED = Calibration(level=0.9, tested=1.90, untested=3.54)
