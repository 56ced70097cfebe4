"""Fits E + A / N^alpha + B / D^beta to many data sets in one program.

Variable projection: for given exponents the best E, A, B >= 0 are those of a
small non-negative least-squares problem, so that only the plane of exponents is
left to search. It is searched as a whole on a grid, which costs one matrix
product of all powers with each other, and from its lowest valleys Newton's
method goes to the bottom. That several valleys lead to one bottom is reported.

Over 300 lines: the two losses share the search, and read side by side.

All of it is float64: Hessians of this law have condition numbers of 1e11
(Open-Athena, scaling-law-analysis), more than float32 has digits.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from concurrent import futures
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm.scaling import newton
from efficient_llm.typing import Array

Loss = Literal['squared', 'huber']
LARGEST_EXPONENT = 100.0
# At 0 a power is a second constant, and the fit is stuck there.
SMALLEST_EXPONENT = 1e-4
# What is added up at a time; rows are padded to a multiple of it.
_BLOCK = 64
# Small, as a batch takes the steps of its slowest problem.
_BATCH = 16
# Blocks that starts are compared on: a sample spread over all rows.
_SAMPLE_BLOCKS = 6
_EXPONENTS = (0.005, *np.geomspace(0.02, LARGEST_EXPONENT, 24).tolist())
_NUM_STARTS: dict[Loss, int] = {'squared': 6, 'huber': 6}
_LOWEST_LOG = -60.0
# Of exponents within a step: valleys are about so far apart.
_LARGEST_RATIO = 3.0
# All sets of columns that may be non-zero, as masks.
_SETS = np.array(
  [[(s >> j) & 1 for j in range(3)] for s in range(1, 8)], np.float64
)


@dataclasses.dataclass(frozen=True)
class Problem:
  """One data set.

  Attributes:
    num_params: Model sizes.
    num_tokens: Tokens.
    loss: In nats.
    weight: Of each row; None for equal ones.
  """

  num_params: np.ndarray
  num_tokens: np.ndarray
  loss: np.ndarray
  weight: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.loss)


@dataclasses.dataclass(frozen=True)
class Fits:
  """Laws, one entry for each problem.

  Attributes:
    constants: [P, 5]: E, A, B, alpha, beta. A and B overflow where an exponent
      runs off to its bound.
    logs: [P, 2]: log A and log B, which do not.
    objective: Sum over rows, of squares or of Huber's function.
    agreeing: Starts that ended at the lowest objective, within 1e-6 of it, on
      a sample of 384 rows where there are more.
    num_starts: How many there were.
    num_steps: The most Newton steps that a start took.
  """

  constants: np.ndarray
  logs: np.ndarray
  objective: np.ndarray
  agreeing: np.ndarray
  num_starts: int
  num_steps: np.ndarray

  def predict(self, num_params: np.ndarray, num_tokens: np.ndarray):
    """Loss in nats by law and place, [P, n]."""
    return predict(self.constants, num_params, num_tokens, logs=self.logs)


def predict(
  constants: np.ndarray,
  num_params: np.ndarray,
  num_tokens: np.ndarray,
  *,
  logs: np.ndarray | None = None,
) -> np.ndarray:
  """Loss in nats.

  Args:
    constants: [..., 5]: E, A, B, alpha, beta.
    num_params: [n].
    num_tokens: [n].
    logs: [..., 2]: log A and log B, where A and B overflow.
  Returns:
    [..., n].
  """
  logs = _log(constants[..., 1:3]) if logs is None else logs
  log_a, log_b = logs[..., 0, None], logs[..., 1, None]
  e, alpha, beta = (constants[..., i, None] for i in (0, 3, 4))
  with np.errstate(over='ignore'):
    # A large A with a large exponent is finite only in logarithms.
    return (
      e
      + np.exp(log_a - alpha * np.log(num_params))
      + np.exp(log_b - beta * np.log(num_tokens))
    )


def solve(
  problems: Sequence[Problem],
  *,
  loss: Loss = 'squared',
  delta: float = 1e-3,
  largest_exponent: float = LARGEST_EXPONENT,
) -> Fits:
  """Fits every problem to its best constants.

  Args:
    problems: Data sets.
    loss: 'squared': of the loss itself, as Choshen et al. 2024. 'huber': of
      its logarithm, as Hoffmann et al. 2022, eq. 3.
    delta: Where Huber's function becomes linear.
    largest_exponent: Bound of alpha and beta.
  Returns:
    The laws. Exponents are in [1e-4, largest_exponent], E, A, B >= 0.
  Raises:
    ValueError: If there is no problem, or one has no rows, or values that are
      not finite and above 0.
  """
  if not problems:
    raise ValueError('There must be a problem to solve; pass one.')
  for problem in problems:
    _check(problem)
  # Problems of equal length share a batch, which ends with its last one.
  order = np.argsort([len(p) for p in problems], kind='stable')
  longest = -(-len(problems[order[-1]]) // _BLOCK) * _BLOCK
  # Few lengths, so few programs.
  length = _BLOCK * 4 ** math.ceil(math.log(longest / _BLOCK, 4))
  batches = [order[i : i + _BATCH] for i in range(0, len(order), _BATCH)]
  # Two threads hide what Python does between programs.
  with futures.ThreadPoolExecutor(2) as pool:
    parts = list(
      pool.map(
        lambda rows: _solve_batch(
          [problems[i] for i in rows], length, loss, delta, largest_exponent
        ),
        batches,
      )
    )
  joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
  back = np.argsort(order, kind='stable')
  constants, logs, objective, agreeing, steps = (part[back] for part in joined)
  return Fits(constants, logs, objective, agreeing, _NUM_STARTS[loss], steps)


def _check(problem: Problem) -> None:
  if not len(problem):
    raise ValueError('A problem must have rows; leave it out.')
  for name in ('num_params', 'num_tokens', 'loss'):
    values = getattr(problem, name)
    if not (np.isfinite(values).all() and (values > 0).all()):
      raise ValueError(f'{name} must be finite and above 0; drop other rows.')


def _solve_batch(
  problems: list[Problem],
  length: int,
  loss: Loss,
  delta: float,
  largest_exponent: float,
) -> tuple[np.ndarray, ...]:
  """Pads a batch to its fixed shape and solves it."""
  x = np.zeros((_BATCH, 2, length))
  y = np.ones((_BATCH, length))
  weight = np.zeros((_BATCH, length))
  least = np.zeros((_BATCH, 2))
  for i, problem in enumerate(problems):
    n = len(problem)
    # Strided, so that the first blocks are a sample of all rows.
    stride = -(-n // (_SAMPLE_BLOCKS * _BLOCK))
    rows = np.concatenate([np.arange(k, n, stride) for k in range(stride)])
    logs = np.log([problem.num_params, problem.num_tokens])
    # Measured from the smallest, every power is at most 1.
    least[i] = logs.min(axis=1)
    x[i, :, :n] = (logs - least[i][:, None])[:, rows]
    y[i, :n] = problem.loss[rows]
    weight[i, :n] = 1.0 if problem.weight is None else problem.weight[rows]
  blocks = -(-max(map(len, problems)) // _BLOCK)
  with jax.enable_x64(True):
    found = program(loss)(
      x, y, weight, np.int64(blocks), delta, largest_exponent
    )
    found = [np.asarray(part)[: len(problems)] for part in found]
  scaled, objective, agreeing, steps = found
  constants = scaled.copy()
  logs = _log(scaled[:, 1:3]) + scaled[:, 3:] * least[: len(problems)]
  with np.errstate(over='ignore'):
    constants[:, 1:3] = np.exp(logs)
  return constants, logs, objective, agreeing, steps


def _log(values: np.ndarray) -> np.ndarray:
  with np.errstate(divide='ignore'):
    return np.log(values)


@functools.cache
def program(loss: Loss) -> Any:
  """The jitted solver of a batch; compiled once for every padded length.

  Args:
    loss: What it minimises.
  """
  solver = _squared if loss == 'squared' else _huber
  return jax.jit(jax.vmap(solver, in_axes=(0, 0, 0, None, None, None)))


def lowered(loss: Loss) -> str:
  """The program of a short batch as text, for those who check its types.

  Args:
    loss: What it minimises.
  """
  shapes = [(_BATCH, 2, _BLOCK), (_BATCH, _BLOCK), (_BATCH, _BLOCK), (), (), ()]
  with jax.enable_x64(True):
    arguments = [
      jax.ShapeDtypeStruct(shape, np.int64 if i == 3 else np.float64)
      for i, shape in enumerate(shapes)
    ]
    return program(loss).lower(*arguments).as_text()


def _sum_blocks(function, blocks: Array, x: Array, y: Array, w: Array):
  """Adds up `function` over as many blocks of rows as there are."""

  def part(i):
    rows = [
      jax.lax.dynamic_slice_in_dim(a, i * _BLOCK, _BLOCK, -1) for a in (x, y, w)
    ]
    return function(*rows)

  zero = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(part, 0)
  )
  return jax.lax.fori_loop(
    0, blocks, lambda i, total: jax.tree.map(jnp.add, total, part(i)), zero
  )


def _nonnegative(gram: Array, right: Array) -> tuple[Array, Array]:
  """Solves min c'Gc - 2 r'c over c >= 0 for 3 columns, by trying all sets.

  Returns:
    c, and the value of the minimum.
  """
  unit = 1 / jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 1e-300))
  gram, right = gram * unit[:, None] * unit, right * unit

  def of_set(mask: Array) -> tuple[Array, Array]:
    g = gram * mask[:, None] * mask + jnp.diag(1 - mask)
    r = right * mask
    cross = jnp.stack(
      [jnp.cross(g[1], g[2]), jnp.cross(g[2], g[0]), jnp.cross(g[0], g[1])]
    )
    det = jnp.dot(g[0], cross[0])
    # Columns that are nearly one: a smaller set says the same.
    c = jnp.where(det > 1e-13, cross.T @ r / jnp.where(det == 0, 1, det), -1.0)
    c = c * mask
    value = c @ gram @ c - 2 * jnp.dot(right, c)
    return c, jnp.where(jnp.all(c >= 0), value, jnp.inf)

  coefficients, values = jax.vmap(of_set)(jnp.asarray(_SETS))
  best = jnp.argmin(values)
  return coefficients[best] * unit, values[best]


def _starts(
  x: Array, y: Array, w: Array, blocks: Array, most: Array, num_starts: int
) -> tuple[Array, Array]:
  """The lowest valleys of the plane of exponents, and E, A, B there.

  Rows are weighted as they come; y is what the law should be.
  """
  grid = jnp.asarray(_EXPONENTS)
  size = len(_EXPONENTS)

  def gram(x_rows: Array, y_rows: Array, w_rows: Array) -> Array:
    powers = jnp.exp(-grid[:, None, None] * x_rows)  # [G, 2, rows]
    columns = jnp.concatenate(
      [jnp.ones_like(y_rows)[None], y_rows[None], powers[:, 0], powers[:, 1]]
    )
    return (columns * w_rows) @ columns.T

  g = _sum_blocks(gram, jnp.minimum(blocks, _SAMPLE_BLOCKS), x, y, w)
  ones, target = g[0], g[1]
  first, second = slice(2, 2 + size), slice(2 + size, 2 + 2 * size)

  def full(a: Array) -> Array:
    return jnp.broadcast_to(a, (size, size))

  def u(a: Array) -> Array:
    return full(a[:, None])

  def v(a: Array) -> Array:
    return full(a[None])

  entries = [
    [full(ones[0]), u(ones[first]), v(ones[second])],
    [u(ones[first]), u(jnp.diagonal(g)[first]), g[first, second]],
    [v(ones[second]), g[first, second], v(jnp.diagonal(g)[second])],
  ]
  matrices = jnp.stack([jnp.stack(row, -1) for row in entries], -2)
  right = jnp.stack([full(ones[1]), u(target[first]), v(target[second])], -1)
  coefficients, values = jax.vmap(jax.vmap(_nonnegative))(matrices, right)
  values = jnp.where((u(grid) <= most) & (v(grid) <= most), values, jnp.inf)
  # A valley is lower than its neighbours. Where A or B is 0 its exponent makes
  # no difference: of such a plain only the first place counts.
  padded = jnp.pad(values, 1, constant_values=jnp.inf)
  apart = 1e-12 * jnp.abs(values)
  is_valley = jnp.full((size, size), True)
  for di in (0, 1, 2):
    for dj in (0, 1, 2):
      neighbour = padded[di : di + size, dj : dj + size]
      if (di, dj) < (1, 1):
        is_valley &= values < neighbour - apart
      elif (di, dj) > (1, 1):
        is_valley &= values <= neighbour + apart
  # Fewer valleys than starts: some places far from each other as well.
  spread = np.full((size, size), np.inf)
  for rank, (i, j) in enumerate([(9, 9), (6, 11), (11, 6), (13, 13), (4, 4)]):
    spread[i, j] = rank
  large = 4 * jnp.abs(values).max(where=jnp.isfinite(values), initial=1.0)
  order = jnp.where(is_valley, values, large * (1 + jnp.asarray(spread)))
  _, places = jax.lax.top_k(-order.ravel(), num_starts)
  i, j = places // size, places % size
  exponents = jnp.minimum(jnp.stack([grid[i], grid[j]], -1), most)
  return exponents, coefficients[i, j]


@dataclasses.dataclass(frozen=True)
class _Leg:
  """A part of a search: where it begins, and how far it goes.

  Attributes:
    start: Number of a start; None goes on from the leg before; 'best' and
      'second' are the ends of earlier searches.
    width: Of Huber's function, in its delta.
    steps: At most.
    full: On all rows, not on the sample.
    ends: Number of the search that ends here; None within one.
    straight: In the coordinates of `_from_straight`.
  """

  start: int | str | None
  width: float
  steps: int
  full: bool
  ends: int | None
  straight: bool = False


def _legs(loss: Loss) -> list[_Leg]:
  """Every start on the sample, then the two best on all rows."""
  count = _NUM_STARTS[loss]
  legs = []
  for k in range(count):
    if loss == 'squared':
      legs.append(_Leg(k, 1.0, 30, False, k))
      continue
    # A small delta makes the function nearly piecewise linear, with few rows
    # that bend it; from far away it is approached through smoother ones.
    legs.append(_Leg(k, 30.0, 10, False, None))
    legs.append(_Leg(None, 6.0, 8, False, None))
    legs.append(_Leg(None, 1.0, 12, False, k))
  for k, name in enumerate(('best', 'second')):
    if loss == 'huber':
      legs.append(_Leg(name, 8.0, 8, True, None))
      legs.append(_Leg(None, 3.0, 8, True, None))
      legs.append(_Leg(None, 1.0, 30, True, None))
      legs.append(_Leg(None, 1.0, 80, True, count + k, straight=True))
    else:
      legs.append(_Leg(name, 1.0, 80, True, count + k))
  return legs


def _search(
  local,
  starts: Array,
  legs: Sequence[_Leg],
  *,
  bounds,
  convert,
  largest_ratio: float | None = None,
) -> tuple[Array, Array, Array, Array]:
  """Goes through all legs with one compiled minimiser.

  Args:
    local: Of a point, a width, whether all rows count, and the coordinates.
    starts: [K, n].
    legs: What to do.
    bounds: Of the coordinates: lower and upper.
    convert: Of a point and whether into straight coordinates.
    largest_ratio: As `newton.minimize` has it.
  Returns:
    The best point on all rows, its value, how many starts agree on the sample,
    and the steps of the last search.
  """
  count = len(starts)
  codes = {None: -1, 'best': count, 'second': count + 1}
  begin = [codes.get(leg.start, leg.start) for leg in legs]
  # What does not end a search is stored where nobody looks.
  ends = [count + 2 if leg.ends is None else leg.ends for leg in legs]
  settings = (
    jnp.array(begin),
    jnp.array([leg.width for leg in legs]),
    jnp.array([leg.steps for leg in legs]),
    jnp.array([leg.full for leg in legs]),
    jnp.array(ends),
    jnp.array([leg.straight for leg in legs]),
  )

  def leg(carry, setting):
    point, points, values = carry
    begin, width, steps, full, end, straight = setting
    order = jnp.argsort(values[:count])
    table = jnp.concatenate([starts, points[order[:2]]])
    point = jnp.where(begin < 0, point, table[jnp.maximum(begin, 0)])
    lower, upper = bounds(straight)
    point, value, taken = newton.minimize(
      lambda z: local(z, width, full, straight),
      jnp.clip(convert(point, straight, True), lower, upper),
      lower=lower,
      upper=upper,
      max_steps=steps,
      largest_ratio=largest_ratio,
    )
    point = convert(point, straight, False)
    value = jnp.where(jnp.isnan(value), jnp.inf, value)
    points, values = points.at[end].set(point), values.at[end].set(value)
    return (point, points, values), taken

  first = (
    starts[0],
    jnp.zeros((count + 3, starts.shape[1])),
    jnp.full(count + 3, jnp.inf),
  )
  (_, points, values), taken = jax.lax.scan(leg, first, settings)
  sampled, last = values[:count], values[count : count + 2]
  agreeing = jnp.sum(sampled <= sampled.min() * (1 + 1e-6) + 1e-300)
  best = count + jnp.argmin(last)
  return points[best], values[best], agreeing, taken[-1]


def _squared(
  x: Array, y: Array, w: Array, blocks: Array, delta: Array, most: Array
):
  """Newton's method on the sum of squares that the best E, A, B leave."""
  del delta
  starts, _ = _starts(x, y, w, blocks, most, _NUM_STARTS['squared'])

  def columns(theta: Array, x_rows: Array) -> Array:
    powers = jnp.exp(-theta[:, None] * x_rows)
    return jnp.concatenate([jnp.ones_like(powers[:1]), powers])

  def project(theta: Array, count: Array) -> Array:

    def sums(x_rows: Array, y_rows: Array, w_rows: Array):
      f = columns(theta, x_rows)
      return (f * w_rows) @ f.T, (f * w_rows) @ y_rows

    gram, right = _sum_blocks(sums, count, x, y, w)
    return _nonnegative(gram, right)[0]

  def local(
    theta: Array, width: Array, full: Array, straight: Array
  ) -> newton.Local:
    del width, straight
    count = jnp.where(full, blocks, jnp.minimum(blocks, _SAMPLE_BLOCKS))
    c = project(theta, count)

    def sums(x_rows: Array, y_rows: Array, w_rows: Array):
      f = columns(theta, x_rows)
      r = c @ f - y_rows
      slope = -x_rows * f[1:]  # of the powers by their exponents
      bend = x_rows**2 * f[1:]
      every = jnp.concatenate([f, c[1:, None] * slope])
      wr = w_rows * r
      return (
        jnp.dot(wr, r),
        (every * w_rows) @ every.T,
        jnp.concatenate([f, slope, bend]) @ wr,
      )

    value, gram, left = _sum_blocks(sums, count, x, y, w)
    left, slope, bend = left[:3], left[3:5], left[5:]
    # E, A, B that are above 0 follow the exponents: they are eliminated from
    # the Hessian, the others rest.
    live = jnp.where(c > 0, 1.0, 0.0)
    cc = gram[:3, :3] * live[:, None] * live + jnp.diag(1 - live)
    own = jnp.concatenate([jnp.zeros((1, 2)), jnp.diag(slope)])
    ct = (gram[:3, 3:] + own) * live[:, None]
    tt = gram[3:, 3:] + jnp.diag(c[1:] * bend)
    scale = jnp.diagonal(cc)
    eliminated = jax.vmap(newton.solve_positive, (None, 1, None), 1)(
      cc, ct, scale
    )
    # Rounding leaves E, A, B a little off; the gradient allows for that.
    gradient = c[1:] * slope - eliminated.T @ (left * live)
    hessian = tt - ct.T @ eliminated
    return newton.Local(
      value, 2 * gradient, 2 * hessian, 2 * jnp.diagonal(gram)[3:]
    )

  theta, value, agreeing, steps = _search(
    local,
    starts,
    _legs('squared'),
    bounds=lambda _: (jnp.full(2, SMALLEST_EXPONENT), jnp.full(2, most)),
    convert=lambda point, *_: point,
    largest_ratio=_LARGEST_RATIO,
  )
  return (
    jnp.concatenate([project(theta, blocks), theta]),
    value,
    agreeing,
    steps,
  )


def _huber(
  x: Array, y: Array, w: Array, blocks: Array, delta: Array, most: Array
):
  """Newton's method on E, the logarithms of A and B, and the exponents."""
  # Relative errors, as logarithms have them near the law.
  exponents, coefficients = _starts(
    x, y, w / y**2, blocks, most, _NUM_STARTS['huber']
  )
  floor = 1e-3 * jnp.sum(w * y) / jnp.sum(w)
  # E itself, as the best one is often 0, and logarithms never get there.
  starts = jnp.concatenate(
    [
      coefficients[:, :1],
      jnp.log(jnp.maximum(coefficients[:, 1:], floor)),
      exponents,
    ],
    -1,
  )

  middle = (x * w).sum(-1) / w.sum()

  def convert(point: Array, straight: Array, there: bool) -> Array:
    change = _to_straight if there else _from_straight
    return change(point, straight, middle, most)

  def bounds(straight: Array) -> tuple[Array, Array]:
    lower = jnp.array([0.0] + [_LOWEST_LOG] * 2 + [SMALLEST_EXPONENT] * 2)
    upper = jnp.concatenate([jnp.full(3, 100.0), jnp.full(2, most)])
    other = jnp.array([0.0, 1e-12, 1e-12, 0.0, 0.0])
    return jnp.where(straight, other, lower), jnp.where(straight, 1e9, upper)

  def local(
    point: Array, width: Array, full: Array, straight: Array
  ) -> newton.Local:
    z = convert(point, straight, False)
    count = jnp.where(full, blocks, jnp.minimum(blocks, _SAMPLE_BLOCKS))
    width = width * delta

    def sums(x_rows: Array, y_rows: Array, w_rows: Array):
      parts = jnp.exp(z[1:3, None] - z[3:, None] * x_rows)
      total = z[0] + parts.sum(0)
      shares = parts / total
      r = jnp.log(total / y_rows)
      inside = jnp.abs(r) <= width
      psi = jnp.clip(r, -width, width)
      value = jnp.where(inside, r * r / 2, width * (jnp.abs(r) - width / 2))
      bent = -x_rows * shares
      gradient = jnp.concatenate([1 / total[None], shares, bent])
      bend = w_rows * (jnp.where(inside, 1.0, 0.0) - psi)
      wp = w_rows * psi
      # Weights of iterated least squares: positive, whatever the sign of psi.
      safe = w_rows * jnp.where(inside, 1.0, width / jnp.abs(r))
      return (
        jnp.dot(w_rows, value),
        (gradient * bend) @ gradient.T,
        jnp.concatenate([gradient, -x_rows * bent]) @ wp,
        (gradient * safe) @ gradient.T,
      )

    value, outer, sums_p, positive = _sum_blocks(sums, count, x, y, w)
    # E enters linearly: it bends nothing.
    s0, s1, s2 = sums_p[1:3], jnp.diag(sums_p[3:5]), sums_p[5:]
    curved = jnp.block([[jnp.diag(s0), s1], [s1, jnp.diag(s2)]])
    hessian = outer + jnp.pad(curved, ((1, 0), (1, 0)))
    gradient = sums_p[:5]
    jacobian = jax.jacfwd(lambda v: convert(v, straight, False))(point)
    bent = jax.hessian(lambda v: gradient @ convert(v, straight, False))(point)
    return newton.Local(
      value,
      jacobian.T @ gradient,
      jacobian.T @ hessian @ jacobian + bent,
      jnp.diagonal(jacobian.T @ positive @ jacobian),
    )

  z, value, agreeing, steps = _search(
    local,
    starts,
    _legs('huber'),
    bounds=bounds,
    convert=convert,
  )
  constants = jnp.concatenate([z[:1], jnp.exp(z[1:3]), z[3:]])
  return constants, value, agreeing, steps


def _from_straight(
  point: Array, straight: Array, middle: Array, most: Array
) -> Array:
  """E, P, Q, alpha P, beta Q into E, log A, log B, alpha, beta.

  P and Q are what A and B add to the loss in the middle of the rows. E can be
  traded for P at nearly no cost while the slope alpha P stays: a ridge that is
  straight in these coordinates, and in the others too bent to follow.
  """
  parts = jnp.where(straight, point[1:3], 1.0)
  exponents = jnp.clip(point[3:] / parts, SMALLEST_EXPONENT, most)
  logs = jnp.log(parts) + exponents * middle
  changed = jnp.concatenate([point[:1], logs, exponents])
  return jnp.where(straight, changed, point)


def _to_straight(
  point: Array, straight: Array, middle: Array, most: Array
) -> Array:
  """What `_from_straight` takes back."""
  del most
  parts = jnp.exp(point[1:3] - point[3:] * middle)
  changed = jnp.concatenate([point[:1], parts, point[3:] * parts])
  return jnp.where(straight, changed, point)
