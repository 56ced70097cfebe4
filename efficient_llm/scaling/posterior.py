"""A law with what is known beforehand, and residuals that hang together.

Over 300 lines: one model and its algebra.

log L = log(E + A/N^alpha + B/D^beta) + gamma (1 - progress) + g(N, D) + noise

The constants have a normal prior (`borrow.Prior`); gamma is what a run in the
middle of its schedule is above one that ends there; g is a Gaussian process
over log N and log D, for residuals of neighbours are alike (universal kriging,
Cressie 1993, section 3.4). Far from the data g is zero and the law speaks. The
constants are linearised around their best values; sizes of g and of the noise
are averaged over a grid by their evidence (Laplace's approximation).

Checkpoints are first gathered into cells of alike size, tokens and progress,
with the median of the runs there: a thousand log lines are no thousand
observations.
"""

import dataclasses
import itertools

import numpy as np
from scipy import linalg

from efficient_llm.scaling import borrow, data

_AMPLITUDES = (1e-4, 0.003, 0.01, 0.03)
_LENGTHS = (1.0, 2.5)
_NOISES = (0.002, 0.005, 0.012, 0.03)
_MIN_PROGRESS = 0.1
_MAX_CELLS = 200
_MAX_STEPS = 40


@dataclasses.dataclass(frozen=True)
class Cells:
  """What a fit sees: [n] each, logarithms from `Reference`."""

  log_params: np.ndarray
  log_tokens: np.ndarray
  log_loss: np.ndarray
  progress: np.ndarray
  count: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reference:
  """Where the shares of the loss are measured: the largest that was seen."""

  log_params: float
  log_tokens: float
  log_loss: float

  @classmethod
  def of(cls, seen: data.Runs) -> 'Reference':
    """The largest size, the most tokens and the lowest loss.

    Args:
      seen: Rows.
    """
    return cls(
      float(np.log(seen.num_params.max())),
      float(np.log(seen.num_tokens.max())),
      float(np.log(seen.loss.min())),
    )


@dataclasses.dataclass(frozen=True)
class Forecast:
  """Loss at some places.

  Attributes:
    mean: Of the logarithm of the loss in nats.
    deviation: Its standard deviation.
    constants: E, A, B, alpha, beta of the most likely law.
    gamma: What the middle of a schedule adds to log L.
  """

  mean: np.ndarray
  deviation: np.ndarray
  constants: np.ndarray
  gamma: float


@dataclasses.dataclass(frozen=True)
class _Fit:
  """A law for one size of g and of the noise."""

  evidence: float
  amplitude: float
  length: float
  noise: float
  z: np.ndarray
  precision: np.ndarray
  jacobian: np.ndarray
  factor: np.ndarray


def progress_of(runs: data.Runs) -> np.ndarray:
  """Share of its own training that each row's run had behind it.

  Args:
    runs: Rows.
  """
  keys = [
    f'{run}|{size}'
    for run, size in zip(runs.run.tolist(), runs.num_params, strict=True)
  ]
  _, run = np.unique(keys, return_inverse=True)
  most = np.zeros(run.max() + 1)
  np.maximum.at(most, run, runs.num_tokens)
  return runs.num_tokens / most[run]


def gather(runs: data.Runs, reference: Reference) -> Cells:
  """Gathers rows into cells; the first tenth of every run is left out.

  Args:
    runs: Rows.
    reference: What logarithms are measured from.
  """
  progress = progress_of(runs)
  late = progress >= _MIN_PROGRESS
  progress = progress[late]
  n = np.log(runs.num_params)[late] - reference.log_params
  d = np.log(runs.num_tokens)[late] - reference.log_tokens
  y = np.log(runs.loss)[late] - reference.log_loss
  width = 0.3
  while True:
    third = np.minimum((3 * progress).astype(int), 2)
    keys = np.stack([np.round(n, 3), np.round(d / width), third], 1)
    cells, place, count = np.unique(
      keys, axis=0, return_inverse=True, return_counts=True
    )
    if len(cells) <= _MAX_CELLS or width > 2:
      break
    width *= 1.4
  place = place.ravel()
  order = np.lexsort((y, place))
  first = np.r_[0, np.cumsum(count)[:-1]]
  middle = y[order][first + (count - 1) // 2] + y[order][first + count // 2]

  def mean(values: np.ndarray) -> np.ndarray:
    return np.bincount(place, values) / count

  return Cells(mean(n), mean(d), middle / 2, mean(progress), count)


def forecast(
  seen: data.Runs,
  target: data.Runs,
  prior: borrow.Prior,
  *,
  correlated: bool = True,
) -> Forecast:
  """Predicts the loss of rows from others; their own is not looked at.

  Args:
    seen: Rows to learn from.
    target: Sizes, tokens and runs to predict.
    prior: Of the constants.
    correlated: Whether residuals of neighbours are alike; without it the law
      alone speaks.
  """
  reference = Reference.of(seen)
  cells = gather(seen, reference)
  fits = _fits(cells, prior, correlated)
  n = np.log(target.num_params) - reference.log_params
  d = np.log(target.num_tokens) - reference.log_tokens
  progress = progress_of(target)
  weights = np.array([one.evidence for one in fits])
  weights = np.exp(weights - weights.max())
  weights /= weights.sum()
  mean, square = np.zeros(len(n)), np.zeros(len(n))
  for weight, one in zip(weights, fits, strict=True):
    if weight < 1e-3:
      continue
    m, variance = _at(one, cells, n, d, progress)
    mean += weight * m
    square += weight * (variance + m**2)
  total = weights[weights >= 1e-3].sum()
  mean, square = mean / total, square / total
  best = fits[int(np.argmax(weights))]
  deviation = np.sqrt(np.maximum(square - mean**2, 1e-12))
  return Forecast(
    mean + reference.log_loss,
    deviation,
    constants_of(best.z, reference),
    float(best.z[5]),
  )


def posterior(
  runs: data.Runs, reference: Reference, prior: borrow.Prior
) -> tuple[np.ndarray, np.ndarray]:
  """The most likely constants, as `borrow.Prior` counts, and covariance.

  Args:
    runs: Rows.
    reference: Of the shares.
    prior: Of the constants.
  """
  fits = _fits(gather(runs, reference), prior, True)
  best = max(fits, key=lambda one: one.evidence)
  return best.z, np.linalg.inv(best.precision)


def constants_of(z: np.ndarray, reference: Reference) -> np.ndarray:
  """E, A, B, alpha, beta of shares at a reference.

  Args:
    z: As `borrow.Prior` counts.
    reference: Of the shares.
  """
  e, a, b = np.exp(z[:3] + reference.log_loss)
  alpha, beta = np.exp(z[3:5])
  with np.errstate(over='ignore'):
    return np.array(
      [
        e,
        a * np.exp(alpha * reference.log_params),
        b * np.exp(beta * reference.log_tokens),
        alpha,
        beta,
      ]
    )


def _law(
  z: np.ndarray, n: np.ndarray, d: np.ndarray, progress: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Log L and its derivatives, [n] and [n, 6]."""
  e, a, b = np.exp(z[:3])
  alpha, beta = np.exp(z[3:5])
  u, v = a * np.exp(-alpha * n), b * np.exp(-beta * d)
  total = e + u + v
  slopes = [e, u, v, -alpha * n * u, -beta * d * v]
  columns = [*(slope / total for slope in slopes), 1 - progress]
  return np.log(total) + z[5] * (1 - progress), np.stack(columns, 1)


def _kernel(n, d, other_n, other_d, length: float) -> np.ndarray:
  apart = (n[:, None] - other_n) ** 2 + (d[:, None] - other_d) ** 2
  return np.exp(-apart / (2 * length**2))


def _fits(cells: Cells, prior: borrow.Prior, correlated: bool) -> list[_Fit]:
  settings = itertools.product(_AMPLITUDES, _LENGTHS, _NOISES)
  found = []
  z = prior.mean
  n, d = cells.log_params, cells.log_tokens
  kernels = {length: _kernel(n, d, n, d, length) for length in _LENGTHS}
  for amplitude, length, noise in settings:
    if amplitude == _AMPLITUDES[0] and length != _LENGTHS[0]:
      continue  # without size a length says nothing
    if not correlated and amplitude != _AMPLITUDES[0]:
      continue
    # Runs of one cell differ by seed and rate, which four of them average out.
    diagonal = noise**2 / np.minimum(cells.count, 4) + 1e-10
    factor = np.linalg.cholesky(
      amplitude**2 * kernels[length] + np.diag(diagonal)
    )
    z, value, precision, jacobian = _most_likely(cells, factor, prior, z)
    evidence = -0.5 * (
      value
      + 2 * np.log(np.diag(factor)).sum()
      + np.linalg.slogdet(precision)[1]
    )
    found.append(
      _Fit(evidence, amplitude, length, noise, z, precision, jacobian, factor)
    )
  return found


def _most_likely(
  cells: Cells, factor: np.ndarray, prior: borrow.Prior, start: np.ndarray
):
  """Levenberg-Marquardt on whitened residuals and prior."""
  root = np.linalg.cholesky(np.linalg.inv(prior.covariance)).T

  def at(z: np.ndarray):
    mean, slopes = _law(z, cells.log_params, cells.log_tokens, cells.progress)
    r = linalg.solve_triangular(factor, mean - cells.log_loss, lower=True)
    q = root @ (z - prior.mean)
    return r @ r + q @ q, r, slopes, q

  z, damping = start, 1e-2
  value, r, slopes, q = at(z)
  for _ in range(_MAX_STEPS):
    white = linalg.solve_triangular(factor, slopes, lower=True)
    hessian = white.T @ white + root.T @ root
    gradient = white.T @ r + root.T @ q
    damped = hessian + damping * np.diag(np.diag(hessian))
    # A step of 1 is a factor of e in a constant.
    trial = z - np.clip(np.linalg.solve(damped, gradient), -1, 1)
    found = at(trial)
    if found[0] < value:
      done = value - found[0] < 1e-7 * value
      z, (value, r, slopes, q) = trial, found
      damping = max(damping / 5, 1e-9)
      if done:
        break
    else:
      damping *= 5
      if damping > 1e8:
        break
  white = linalg.solve_triangular(factor, slopes, lower=True)
  return z, value, white.T @ white + root.T @ root, slopes


def _at(
  one: _Fit, cells: Cells, n: np.ndarray, d: np.ndarray, progress: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and variance of log L - reference at other places."""
  mean, slopes = _law(one.z, n, d, progress)
  near = one.amplitude**2 * _kernel(
    n, d, cells.log_params, cells.log_tokens, one.length
  )
  fitted, _ = _law(one.z, cells.log_params, cells.log_tokens, cells.progress)
  gains = linalg.cho_solve((one.factor, True), near.T)
  mean = mean + gains.T @ (cells.log_loss - fitted)
  left = slopes - gains.T @ one.jacobian
  variance = (
    one.amplitude**2
    - np.einsum('ij,ji->i', near, gains)
    + np.einsum('ij,ji->i', left, np.linalg.solve(one.precision, left.T))
    + one.noise**2 / 4
  )
  return mean, np.maximum(variance, 0.0)
