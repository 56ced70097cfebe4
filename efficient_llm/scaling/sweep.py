"""The guide's procedure: which models, which checkpoints, how far the target.

READ FIRST. Choshen, Zhang and Andreas, "A Hitchhiker's Guide to Scaling Law
Estimation", arXiv:2410.11840: a law is fitted to checkpoints of the k smallest
models of a family, up to a share p of their training, and judged by its
absolute relative error (ARE) at the end of the largest one. `GUIDE` has the
settings of the authors' code.

Nothing here looks at the target but `relative_error`.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from scipy import optimize

from efficient_llm import typing as types
from efficient_llm.scaling import data, fit

# Muennighoff et al. 2023's fit to C4: log A, log B, log E, alpha, beta. The
# guide starts there, and borrows log A and alpha from it (its section 6).
MUENNIGHOFF = (6.255414, 7.3049974, 0.6254804, 0.3526596, 0.3526596)


@dataclasses.dataclass(frozen=True)
class SweepConfig:
  """What a law is fitted to, and judged by.

  Attributes:
    min_tokens: Checkpoints with no more are left out: 10 B in the guide.
    target_share: The target is judged from this share of its training on; 0.7
      in the text, None for its last checkpoint alone as in the heat maps.
    shares: Of the longest training among the models, strictly below which
      checkpoints are fitted.
    order: 'smallest': the k smallest models predict the largest. 'nearest': the
      k just below the target. 'scale_down': the k largest predict the smallest.
    last_only: Fits only the last checkpoint of each run below the cut.
  """

  min_tokens: float = 1e10
  target_share: float | None = 0.7
  shares: tuple[float, ...] = tuple(p / 10 for p in range(1, 11))
  order: Literal['smallest', 'nearest', 'scale_down'] = 'smallest'
  last_only: bool = False

  def validate(self) -> None:
    types.check_choices(self, name='sweep')
    if self.min_tokens < 0:
      raise ValueError(
        f'sweep.min_tokens={self.min_tokens} must be at least 0.'
      )
    bad = [p for p in (*self.shares, self.target_share or 1) if not 0 < p <= 1]
    if bad or not self.shares:
      raise ValueError(
        f'sweep.shares={self.shares} and target_share={self.target_share} must '
        'be above 0 and at most 1.'
      )


GUIDE = SweepConfig()


@dataclasses.dataclass(frozen=True)
class Cell:
  """One square of the heat map: what is fitted, and what it must predict.

  Attributes:
    num_models: k.
    share: p.
    seen: Rows to fit.
    target: Rows to be judged by.
  """

  num_models: int
  share: float
  seen: data.Runs
  target: data.Runs


def target_of(runs: data.Runs, config: SweepConfig = GUIDE) -> data.Runs:
  """Rows of the model that is to be predicted.

  Args:
    runs: Of one family.
    config: Which part of its training.
  """
  size = runs.sizes[0 if config.order == 'scale_down' else -1]
  rows = runs.where(runs.num_params == size)
  most = rows.num_tokens.max()
  if config.target_share is None:
    return rows.where(rows.num_tokens == most)
  return rows.where(rows.num_tokens >= config.target_share * most)


def seen_of(
  runs: data.Runs, sizes: np.ndarray, share: float, config: SweepConfig = GUIDE
) -> data.Runs:
  """Checkpoints of some models that a law may be fitted to.

  Args:
    runs: Of one family.
    sizes: The models.
    share: Of the longest training among them; 1.0 leaves out its last
      checkpoint, as the guide's code does.
    config: Cuts.
  """
  mine = runs.where(np.isin(runs.num_params, sizes))
  below = mine.num_tokens < share * mine.num_tokens.max()
  mine = mine.where(below & (mine.num_tokens > config.min_tokens))
  if not config.last_only or not len(mine):
    return mine
  most: dict[tuple[str, float], int] = {}
  for i, run in enumerate(zip(mine.run, mine.num_params, strict=True)):
    if run not in most or mine.num_tokens[i] > mine.num_tokens[most[run]]:
      most[run] = i
  return mine.where(np.array(sorted(most.values())))


def cells(runs: data.Runs, config: SweepConfig = GUIDE) -> Iterator[Cell]:
  """All squares of a family's heat map that have rows.

  Of more than 20 sizes five numbers of models or so are taken.

  Args:
    runs: Of one family.
    config: Of the sweep.
  """
  others = runs.sizes[1:] if config.order == 'scale_down' else runs.sizes[:-1]
  numbers = range(2, len(others) + 1)
  if len(numbers) > 60:
    numbers = numbers[::10]
  elif len(numbers) > 20:
    numbers = numbers[:: len(numbers) // 5]
  target = target_of(runs, config)
  for count in numbers:
    chosen = others[:count] if config.order == 'smallest' else others[-count:]
    for share in config.shares:
      seen = seen_of(runs, chosen, share, config)
      # A model whose checkpoints are all cut leaves a smaller k, not this one.
      if len(seen) and len(seen.sizes) == count:
        yield Cell(count, share, seen, target)


def relative_error(predicted: np.ndarray, target: data.Runs) -> float:
  """Mean of |L - predicted| / L, in percent.

  Args:
    predicted: Loss at each row of the target.
    target: What was measured.
  """
  return float(100 * np.mean(np.abs(target.loss - predicted) / target.loss))


def guide_fit(
  seen: data.Runs, *, borrowed: Sequence[float] | None = None
) -> np.ndarray | None:
  """Fits as the guide's code does: one start, squares, scipy's `curve_fit`.

  Args:
    seen: Rows to fit.
    borrowed: log A and alpha of another family, then kept (its section 6).
  Returns:
    E, A, B, alpha, beta; None where scipy gives up (a white square).
  """
  log_n, log_d = np.log(seen.num_params), np.log(seen.num_tokens)
  kept = np.array(MUENNIGHOFF)
  free = np.arange(5)
  if borrowed is not None:
    kept[[0, 3]] = borrowed
    free = np.array([1, 2, 4])

  def law(_, *values):
    every = kept.copy()
    every[free] = values
    a, b, e, alpha, beta = every
    # As the code writes it; other roundings end in other valleys.
    n_part = np.exp(a) / np.exp(alpha * log_n)
    return np.exp(e) + n_part + np.exp(b) / np.exp(beta * log_d)

  lower = np.array([-np.inf] * 3 + [0.0] * 2)
  found = _curve_fit(law, seen.loss, kept[free], lower[free])
  if found is None:
    return None
  kept[free] = found
  a, b, e, alpha, beta = kept
  with np.errstate(over='ignore'):
    return np.array([np.exp(e), np.exp(a), np.exp(b), alpha, beta])


def _curve_fit(law, loss, start, lower) -> np.ndarray | None:
  x = np.zeros(len(loss))
  bounds = (lower, np.inf)
  with warnings.catch_warnings(), np.errstate(all='ignore'):
    warnings.simplefilter('ignore')
    try:
      return optimize.curve_fit(law, x, loss, p0=start, bounds=bounds)[0]
    except RuntimeError:
      pass
    except ValueError:
      return None
    try:
      return optimize.curve_fit(
        law, x, loss, p0=start, bounds=bounds, method='dogbox', x_scale=start
      )[0]
    except (RuntimeError, ValueError):
      return None


def guide_error(cell: Cell) -> float | None:
  """ARE of the guide's own fit in a square, in percent.

  Args:
    cell: Of a sweep.
  """
  constants = guide_fit(cell.seen)
  if constants is None:
    return None
  predicted = fit.predict(
    constants, cell.target.num_params, cell.target.num_tokens
  )
  return relative_error(predicted, cell.target)


def best_seen(seen: data.Runs) -> float:
  """The lowest loss so far: what a prediction must beat.

  Args:
    seen: Rows that were to be had.
  """
  return float(seen.loss.min())


def last_seen(seen: data.Runs) -> float:
  """The loss of the largest model's last checkpoint so far.

  Args:
    seen: Rows that were to be had.
  """
  largest = seen.where(seen.num_params == seen.sizes[-1])
  return float(largest.loss[np.argmax(largest.num_tokens)])


@dataclasses.dataclass(frozen=True)
class HeatMap:
  """ARE over numbers of models and shares of training.

  Attributes:
    num_models: k of each row.
    shares: p of each column.
    errors: In percent, NaN where there is no law.
  """

  num_models: tuple[int, ...]
  shares: tuple[float, ...]
  errors: np.ndarray


def heat_map(
  runs: data.Runs, config: SweepConfig = GUIDE, *, solver: str = 'batched'
) -> HeatMap:
  """Fits every square of a family.

  Args:
    runs: Of one family.
    config: Of the sweep.
    solver: 'batched': all at once to their best squares. 'guide': one by one
      as the guide's code.
  """
  squares = list(cells(runs, config))
  counts = sorted({cell.num_models for cell in squares})
  errors = np.full((len(counts), len(config.shares)), np.nan)
  fits = None
  if solver == 'batched' and squares:
    fits = fit.solve([problem_of(cell.seen) for cell in squares])
  for i, cell in enumerate(squares):
    if fits is None:
      error = guide_error(cell)
    else:
      target = cell.target
      predicted = fits.predict(target.num_params, target.num_tokens)[i]
      error = relative_error(predicted, cell.target)
    place = counts.index(cell.num_models), config.shares.index(cell.share)
    errors[place] = np.nan if error is None else error
  return HeatMap(tuple(counts), config.shares, errors)


def problem_of(
  seen: data.Runs, weight: np.ndarray | None = None
) -> fit.Problem:
  """What the solver takes.

  Args:
    seen: Rows.
    weight: Of each.
  """
  return fit.Problem(seen.num_params, seen.num_tokens, seen.loss, weight)
