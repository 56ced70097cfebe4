"""The catalogue of laws: what each says, what it is fitted to, who found it.

Over 300 lines: the catalogue, and what its laws say.

A law is its value as a function of constants and inputs, with bounds and
starts; `fit_law` fits any of them by least squares from every start. The law of
sizes and tokens has a faster and global solver in `fit`. What is not a value of
constants (parabolas over budgets, the cheapest model for given traffic) is in
`allocation`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import numpy as np
from scipy import optimize

from efficient_llm.scaling import repeated

Inputs = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Law:
  """One functional form.

  Attributes:
    formula: In words of the source.
    inputs: What it needs to know of a run.
    constants: Names of what is fitted.
    value: Of constants and inputs.
    lower: Bounds of the constants.
    upper: Bounds of the constants.
    starts: Values to start each constant from; all combinations are tried.
    source: Paper and equation.
    in_logs: Whether residuals are those of logarithms.
  """

  formula: str
  inputs: tuple[str, ...]
  constants: tuple[str, ...]
  value: Callable[[np.ndarray, Inputs], np.ndarray]
  lower: tuple[float, ...]
  upper: tuple[float, ...]
  starts: tuple[tuple[float, ...], ...]
  source: str
  in_logs: bool = True


@dataclasses.dataclass(frozen=True)
class LawFit:
  """A law with its constants.

  Attributes:
    constants: By name.
    rms: Root of the mean squared residual: of log values, or of values.
    at_bound: Names of constants at a bound: the data do not determine them.
    condition: Of the Jacobian with unit columns; above 1e6 or so constants
      trade against each other and mean nothing by themselves.
    agreeing: Share of starts that ended there.
  """

  law: Law
  constants: dict[str, float]
  rms: float
  at_bound: tuple[str, ...]
  condition: float
  agreeing: float

  def predict(self, inputs: Inputs) -> np.ndarray:
    """Values at other inputs.

    Args:
      inputs: What the law needs, by name.
    """
    return self.law.value(np.array(list(self.constants.values())), inputs)


def fit_law(
  name: str,
  inputs: Inputs,
  values: np.ndarray,
  *,
  huber_delta: float | None = None,
) -> LawFit:
  """Fits a law of the catalogue.

  Args:
    name: Of the law.
    inputs: What it needs, by name.
    values: What was measured.
    huber_delta: Where Huber's loss becomes linear; None for squares.
  Raises:
    ValueError: If there is no such law, an input is missing or values are not
      finite, or there are fewer of them than constants.
  """
  if name not in CATALOGUE:
    raise ValueError(f'law={name!r} must be one of {", ".join(CATALOGUE)}.')
  law = CATALOGUE[name]
  missing = [one for one in law.inputs if one not in inputs]
  if missing:
    raise ValueError(
      f'Law {name} needs {", ".join(law.inputs)}; add {missing}.'
    )
  values = np.asarray(values, np.float64)
  if not np.isfinite(values).all() or (law.in_logs and (values <= 0).any()):
    raise ValueError('Values must be finite, and losses above 0; drop others.')
  if len(values) < len(law.constants):
    raise ValueError(
      f'Law {name} has {len(law.constants)} constants and {len(values)} values '
      'to fit; measure more or take a smaller law.'
    )
  wanted = np.log(values) if law.in_logs else values

  def residual(theta: np.ndarray) -> np.ndarray:
    with np.errstate(all='ignore'):
      found = law.value(theta, inputs)
      found = np.log(found) if law.in_logs else found
    return np.nan_to_num(found - wanted, nan=1e3, posinf=1e3, neginf=-1e3)

  found = [
    optimize.least_squares(
      residual,
      np.clip(start, law.lower, law.upper),
      bounds=(law.lower, law.upper),
      x_scale='jac',
      f_scale=huber_delta or 1.0,
      max_nfev=400,
      loss='linear' if huber_delta is None else 'huber',
    )
    for start in itertools.product(*law.starts)
  ]
  costs = np.array([one.cost for one in found])
  best = found[int(np.argmin(costs))]
  lower, upper = np.array(law.lower), np.array(law.upper)
  close = 1e-6 * np.maximum(1, np.abs(best.x))
  bound = (best.x - lower < close) | (upper - best.x < close)
  columns = best.jac / np.maximum(np.linalg.norm(best.jac, axis=0), 1e-300)
  return LawFit(
    law,
    dict(zip(law.constants, best.x.tolist(), strict=True)),
    float(np.sqrt(np.mean(best.fun**2))),
    tuple(np.array(law.constants)[bound].tolist()),
    float(np.linalg.cond(columns)),
    float(np.mean(costs <= best.cost * (1 + 1e-3) + 1e-15)),
  )


def _chinchilla(c: np.ndarray, x: Inputs) -> np.ndarray:
  e, a, b, alpha, beta = c
  n, d = np.log(x['num_params']), np.log(x['num_tokens'])
  return e + np.exp(a - alpha * n) + np.exp(b - beta * d)


def _kaplan(c: np.ndarray, x: Inputs) -> np.ndarray:
  n_c, d_c, alpha_n, alpha_d = c
  n, d = np.log(x['num_params']), np.log(x['num_tokens'])
  inner = np.exp((n_c - n) * alpha_n / alpha_d) + np.exp(d_c - d)
  return inner**alpha_d


def _data_constrained(c: np.ndarray, x: Inputs) -> np.ndarray:
  e, a, b, alpha, beta, token_decay, parameter_decay = c
  unique = np.minimum(x['unique_tokens'], x['num_tokens'])
  d = repeated.tokens(x['num_tokens'], unique, np.exp(token_decay))
  n = repeated.params(x['num_params'], unique, np.exp(parameter_decay))
  return e + np.exp(a) / n**alpha + np.exp(b) / d**beta


def effective_experts(
  num_experts: np.ndarray, start: float, most: float
) -> np.ndarray:
  """Experts as far as they help (Clark et al. 2022, eq. 5).

  Args:
    num_experts: Of a layer.
    start: Where the saturation begins.
    most: What infinitely many are worth.
  """
  shifted = num_experts - 1 + 1 / (1 / start - 1 / most)
  return 1 / (1 / shifted + 1 / most)


def _routed(c: np.ndarray, x: Inputs) -> np.ndarray:
  a, b, mixed, d, start, above = c
  n = np.log(x['num_params'])
  e = np.log(
    effective_experts(
      x['num_experts'], np.exp(start), np.exp(start) + np.exp(above)
    )
  )
  return np.exp(a * n + b * e + mixed * n * e + d)


def _diloco(c: np.ndarray, x: Inputs) -> np.ndarray:
  scale, alpha, islands = c
  return np.exp(
    scale + alpha * np.log(x['num_params']) + islands * np.log(x['num_islands'])
  )


def _diloco_floor(c: np.ndarray, x: Inputs) -> np.ndarray:
  return c[0] + _diloco(c[1:], x)


def _overtraining(c: np.ndarray, x: Inputs) -> np.ndarray:
  e, a, b, eta = c
  ratio = np.log(x['num_tokens'] / x['num_params'])
  compute = np.log(6 * x['num_params'] * x['num_tokens'])
  up = np.exp(a + eta * (ratio - compute))
  return e + up + np.exp(b - eta * (ratio + compute))


def _downstream(c: np.ndarray, x: Inputs) -> np.ndarray:
  epsilon, k, gamma = c
  return epsilon - np.exp(k - gamma * x['loss'])


def _multi_power(c: np.ndarray, x: Inputs) -> np.ndarray:
  """One run after the other: inputs `run`, `step` and `learning_rate`."""
  floor, a, alpha, b, drop, beta, gamma = c
  out = np.empty(len(x['step']))
  for run in dict.fromkeys(x['run'].tolist()):
    mine = x['run'] == run
    rate, step = x['learning_rate'][mine], x['step'][mine]
    # Sums over steps, as integrals between the rows that there are; all before
    # the first row was at its rate.
    middle = np.r_[rate[0], (rate[1:] + rate[:-1]) / 2]
    area = np.cumsum(middle * np.diff(step, prepend=0))
    fall = -np.diff(rate, prepend=rate[0])
    since = area[:, None] - np.r_[0, area[:-1]][None]
    gain = 1 - (1 + drop * rate[None] ** -gamma * np.maximum(since, 0)) ** -beta
    lower = np.tril(np.ones_like(gain)) * gain
    out[mine] = floor + a * area**-alpha - b * (lower @ fall)
  return out


def _coverage(c: np.ndarray, x: Inputs) -> np.ndarray:
  a, b = c
  return np.exp(-np.exp(a) * x['num_samples'] ** -b)


def pass_at_k(
  num_samples: np.ndarray, num_correct: np.ndarray, k: int
) -> np.ndarray:
  """Chance that one of k answers is right, without bias.

  1 - C(n - c, k) / C(n, k), Chen et al. 2021, arXiv:2107.03374, eq. 1.

  Args:
    num_samples: n, answers drawn to each problem.
    num_correct: c, right ones.
    k: At most the smallest n.
  Raises:
    ValueError: If k is above a number of samples.
  """
  n = np.asarray(num_samples, np.int64)
  c = np.asarray(num_correct, np.int64)
  if k > n.min() or k < 1:
    raise ValueError(f'{k=} must be from 1 to {n.min()}; draw more samples.')
  log_wrong = np.zeros(np.broadcast(n, c).shape)
  with np.errstate(divide='ignore'):
    for i in range(k):
      log_wrong = log_wrong + np.log(np.maximum(n - c - i, 0) / (n - i))
  return -np.expm1(log_wrong)


_ND = ('num_params', 'num_tokens')
CATALOGUE: dict[str, Law] = {
  'chinchilla': Law(
    'E + A / N^alpha + B / D^beta',
    _ND,
    ('E', 'log_A', 'log_B', 'alpha', 'beta'),
    _chinchilla,
    (0, -20, -20, 0, 0),
    (20, 60, 60, 3, 3),
    ((0.5, 1.7), (3, 6), (3, 7), (0.3,), (0.3,)),
    'Hoffmann et al. 2022, arXiv:2203.15556, eq. 2; the guide, eq. 1',
  ),
  'kaplan': Law(
    '((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D',
    _ND,
    ('log_N_c', 'log_D_c', 'alpha_N', 'alpha_D'),
    _kaplan,
    (0, 0, 1e-3, 1e-3),
    (200, 200, 2, 2),
    ((20, 32), (20, 32), (0.08, 0.3), (0.1, 0.3)),
    'Kaplan et al. 2020, arXiv:2001.08361, eq. 1.5',
  ),
  'data_constrained': Law(
    "E + A / N'^alpha + B / D'^beta, with repeated tokens worth less",
    (*_ND, 'unique_tokens'),
    ('E', 'log_A', 'log_B', 'alpha', 'beta', 'log_R_D', 'log_R_N'),
    _data_constrained,
    (0, -20, -20, 0, 0, -3, -3),
    (20, 60, 60, 3, 3, 12, 12),
    ((0.5, 1.7), (6,), (7,), (0.35,), (0.35,), (2.7,), (1.7,)),
    'Muennighoff et al. 2023, arXiv:2305.16264, eqs. 5 and 6',
  ),
  'routed': Law(
    'log L = a log N + b log E + c log N log E + d, E saturating',
    ('num_params', 'num_experts'),
    ('a', 'b', 'c', 'd', 'log_E_start', 'log_E_above'),
    _routed,
    (-2, -2, -1, -20, 0, 0),
    (2, 2, 1, 20, 6, 12),
    ((-0.08,), (-0.1, -0.3), (0.01,), (1.0, 2.5), (0.7,), (5.7,)),
    'Clark et al. 2022, arXiv:2202.01169, eqs. 5 and 7',
  ),
  'diloco': Law(
    'A N^alpha M^beta',
    ('num_params', 'num_islands'),
    ('log_A', 'alpha', 'beta'),
    _diloco,
    (-50, -3, -3),
    (50, 3, 3),
    ((3,), (-0.1,), (0.01,)),
    'Charles et al. 2025, arXiv:2503.09799, section 6',
  ),
  'diloco_floor': Law(
    'E + A N^alpha M^beta',
    ('num_params', 'num_islands'),
    ('E', 'log_A', 'alpha', 'beta'),
    _diloco_floor,
    (0, -50, -3, -3),
    (20, 50, 3, 3),
    ((0.5, 1.7), (3, 6), (-0.1, -0.3), (0.01,)),
    'the same with a floor',
  ),
  'overtraining': Law(
    'E + (a M^eta + b M^-eta) C^-eta, M = D / N, C = 6 N D',
    _ND,
    ('E', 'log_a', 'log_b', 'eta'),
    _overtraining,
    (0, -50, -50, 0),
    (20, 50, 50, 2),
    ((0.5, 1.7), (2, 4), (4, 7), (0.1, 0.2)),
    'Gadre et al. 2024, arXiv:2403.08540, eq. 4',
  ),
  'downstream': Law(
    'error = epsilon - k exp(-gamma loss)',
    ('loss',),
    ('epsilon', 'log_k', 'gamma'),
    _downstream,
    (0, -20, 0),
    (2, 20, 10),
    ((0.8,), (0, 1), (0.5, 1.5)),
    'Gadre et al. 2024, arXiv:2403.08540, eq. 5',
    in_logs=False,
  ),
  'multi_power': Law(
    'L0 + A S^-alpha - B sum (rate falls) (1 - (1 + C rate^-gamma S)^-beta)',
    ('run', 'step', 'learning_rate'),
    ('L0', 'A', 'alpha', 'B', 'C', 'beta', 'gamma'),
    _multi_power,
    (0, 0, 0, 0, 0, 0, 0),
    (20, 50, 3, 1e4, 50, 3, 3),
    ((2.5,), (0.5,), (0.5,), (300,), (2,), (0.6,), (0.6,)),
    'Luo et al. 2025, arXiv:2503.12811, eqs. 2 and 3',
  ),
  'coverage': Law(
    'coverage = exp(-a k^-b)',
    ('num_samples',),
    ('log_a', 'b'),
    _coverage,
    (-20, 0),
    (20, 5),
    ((-1, 1), (0.3, 1)),
    'Brown et al. 2024, arXiv:2407.21787, eq. 3',
  ),
}
