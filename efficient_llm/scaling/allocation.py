"""Which size for which budget: parabolas, envelopes, and traffic to serve.

Approaches 1 and 2 of Hoffmann et al. 2022 read the best size off the data,
approach 3 off a fitted law; serving moves it to smaller models that are trained
longer (Sardana et al. 2024).
"""

import dataclasses
from typing import Literal

import numpy as np
from scipy import interpolate, optimize

from efficient_llm.scaling import fit


@dataclasses.dataclass(frozen=True)
class Isoflop:
  """The best size of one budget.

  Attributes:
    flops: The budget.
    num_params: At the parabola's minimum.
    num_tokens: The same.
    loss: The same.
    brackets: Whether sizes on both sides of the minimum were trained; if not
      it is a guess beyond the data.
    curvature: Of the loss over log N, above 0 for a minimum.
  """

  flops: float
  num_params: float
  num_tokens: float
  loss: float
  brackets: bool
  curvature: float


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """N* = scale C^exponent."""

  scale: float
  exponent: float

  def at(self, flops: np.ndarray) -> np.ndarray:
    """The value at some compute.

    Args:
      flops: Where.
    """
    return self.scale * np.asarray(flops) ** self.exponent


def isoflop_minima(
  flops: np.ndarray,
  num_params: np.ndarray,
  num_tokens: np.ndarray,
  loss: np.ndarray,
  *,
  width: float = 0.02,
  curve: Literal['parabola', 'akima'] = 'parabola',
) -> list[Isoflop]:
  """Finds the best size of every budget (approach 2).

  A parabola in log N is biased where the loss is not symmetric about its
  minimum, as it never is where alpha and beta differ: at 3.8e25 FLOPs the
  tokens come out 5 % off on Chinchilla's own surface and 17 % on a steeper one
  (`tests/scaling/allocation_test`). Akima's interpolation, which Porian et al.
  2024 use (arXiv:2406.19146, appendix C), needs closely spaced sizes.

  Args:
    flops: Budget of each row.
    num_params: Sizes.
    num_tokens: Tokens.
    loss: In nats.
    width: Budgets closer than this in log C are one.
    curve: What goes through the losses of a budget.
  Returns:
    One for each budget with three sizes or more, ascending.
  """
  log_c = np.log(flops)
  order = np.argsort(log_c)
  groups = np.split(order, np.flatnonzero(np.diff(log_c[order]) > width) + 1)
  found = []
  for rows in groups:
    x = np.log(num_params[rows])
    if len(np.unique(x)) < 3:
      continue
    middle = x.mean()
    bend, slope, level = np.polyfit(x - middle, loss[rows], 2)
    budget = float(np.exp(log_c[rows].mean()))
    if curve == 'akima':
      found.append(_akima(budget, x, num_tokens[rows], loss[rows]))
      continue
    if bend <= 0:
      found.append(
        Isoflop(budget, np.nan, np.nan, float(loss[rows].min()), False, bend)
      )
      continue
    at = -slope / (2 * bend)
    tokens_line = np.polyfit(x - middle, np.log(num_tokens[rows]), 1)
    found.append(
      Isoflop(
        budget,
        float(np.exp(at + middle)),
        float(np.exp(np.polyval(tokens_line, at))),
        float(level - slope**2 / (4 * bend)),
        bool((x - middle).min() < at < (x - middle).max()),
        float(bend),
      )
    )
  return found


def _akima(
  budget: float, x: np.ndarray, num_tokens: np.ndarray, loss: np.ndarray
) -> Isoflop:
  x, first = np.unique(x, return_index=True)
  curve = interpolate.Akima1DInterpolator(x, np.log(loss[first]))
  places = np.linspace(x[0], x[-1], 4001)
  values = curve(places)
  i = int(np.argmin(values))
  tokens = np.interp(places[i], x, np.log(num_tokens[first]))
  inside = 0 < i < len(places) - 1
  bend = float(curve(places[i], 2)) * float(np.exp(values[i]))
  n, d, lowest = np.exp([places[i], tokens, values[i]]).tolist()
  return Isoflop(budget, n, d, lowest, inside, bend)


def power_law(flops: np.ndarray, values: np.ndarray) -> PowerLaw:
  """Fits a line in logarithms.

  Args:
    flops: Compute.
    values: Best sizes, or tokens.
  Raises:
    ValueError: If there are fewer than two budgets.
  """
  if len(flops) < 2:
    raise ValueError(
      f'{len(flops)} budgets bracket a minimum, and two must; train more sizes.'
    )
  slope, level = np.polyfit(np.log(flops), np.log(values), 1)
  return PowerLaw(float(np.exp(level)), float(slope))


def envelope(
  flops: np.ndarray,
  num_params: np.ndarray,
  loss: np.ndarray,
  num_bins: int = 30,
) -> tuple[np.ndarray, np.ndarray]:
  """The size with the lowest loss at every compute (approach 1).

  Args:
    flops: Of every checkpoint of every run.
    num_params: Sizes.
    loss: In nats.
    num_bins: Of log C, of equal width.
  Returns:
    Compute and size of the bins that hold two sizes or more.
  """
  log_c = np.log(flops)
  edges = np.linspace(log_c.min(), log_c.max() + 1e-9, num_bins + 1)
  place = np.digitize(log_c, edges) - 1
  best = []
  for i in range(num_bins):
    rows = np.flatnonzero(place == i)
    if len(np.unique(num_params[rows])) >= 2:
      best.append(rows[np.argmin(loss[rows])])
  return flops[best], num_params[best]


def optimal(constants: np.ndarray, flops: float) -> tuple[float, float]:
  """Sizes and tokens of the lowest loss for 6 N D = C (approach 3).

  N* = G (C / 6)^(beta / (alpha + beta)), G = (alpha A / beta B)^(1 / (alpha +
  beta)): Hoffmann et al. 2022, eq. 4.

  Args:
    constants: E, A, B, alpha, beta.
    flops: C.
  """
  _, a, b, alpha, beta = constants
  g = (np.log(alpha * a) - np.log(beta * b)) / (alpha + beta)
  n = g + beta / (alpha + beta) * np.log(flops / 6)
  return float(np.exp(n)), float(flops / 6 / np.exp(n))


def cheapest(
  constants: np.ndarray, loss: float, served_tokens: float
) -> tuple[float, float]:
  """The model that reaches a loss with the least compute, serving included.

  Minimises 6 N D + 2 N D_served with L(N, D) = loss: Sardana et al. 2024,
  arXiv:2401.00448, eqs. 3 and 4.

  Args:
    constants: E, A, B, alpha, beta.
    loss: To reach.
    served_tokens: In the model's life, read and written.
  Returns:
    Parameters and tokens to train on.
  Raises:
    ValueError: If no size reaches the loss.
  """
  e, a, b, alpha, beta = constants
  if loss <= e:
    raise ValueError(
      f'{loss=} must be above the floor E={e:.4f}, which no size gets below.'
    )

  def tokens(log_n: float) -> float:
    left = loss - e - a * np.exp(-alpha * log_n)
    return (b / left) ** (1 / beta) if left > 0 else np.inf

  # The smallest that reaches it, with infinitely many tokens.
  least = np.log(a / (loss - e)) / alpha

  def cost(log_n: float) -> float:
    return log_n + np.log(6 * tokens(log_n) + 2 * served_tokens)

  found = optimize.minimize_scalar(
    cost,
    bounds=(least + 1e-6, least + 20),
    method='bounded',
    options={'xatol': 1e-10},
  )
  return float(np.exp(found.x)), float(tokens(found.x))


def predicted(constants: np.ndarray, num_params: float, num_tokens: float):
  """Loss of one model.

  Args:
    constants: E, A, B, alpha, beta.
    num_params: N.
    num_tokens: D.
  """
  return float(
    fit.predict(constants, np.array([num_params]), np.array([num_tokens]))[0]
  )
