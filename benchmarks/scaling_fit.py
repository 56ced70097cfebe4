"""The guide's whole sweep as one batched solve, against scipy fit by fit.

    ./run.sh python -m benchmarks.scaling_fit [--data=DIR] [--quick]

Every square of the heat maps (numbers of models k, shares of training p) of
every published family with three or more sizes is a fit of
E + A/N^alpha + B/D^beta, where it has five rows or more; checkpoints are not
cut at 10 B tokens, which most families never reach.

  num_fits                 squares
  seconds                  all of them by squares, to the global optimum, in a
                           fresh process, compilation included
  seconds_huber            the same with Huber's loss of log L, delta 1e-3
  scipy_single_seconds     the guide's own `curve_fit`, one start, on all
  scipy_multistart_seconds L-BFGS-B on Huber's loss from 24 starts with the
                           analytic gradient, on `sample` fits drawn at random,
                           times num_fits / sample
  ratio_multistart         scipy_multistart_seconds / seconds_huber
  ratio_single             scipy_single_seconds / seconds
  worse_than_scipy         fits whose objective is above scipy's best by more
                           than 1e-9 of it: by squares on all, by Huber's loss
                           on the sample. Objectives are evaluated alike, from
                           the constants; residuals of 1e-9 of the loss, where
                           five constants meet five rows, count as none: the
                           data have seven digits.
scipy has one thread; JAX has those of the machine, two here. cpu_* are the same
with the time of all cores added up, which neighbours on the machine do not
change; `load` says how many there were.
"""

import argparse
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import optimize

from benchmarks import harness
from efficient_llm.scaling import data as data_lib
from efficient_llm.scaling import fit, published, sweep

_DELTA = 1e-3
_MIN_ROWS = 5
_TOLERANCE = 1e-9
_ROUNDING = 1e-18


def problems(folder: pathlib.Path) -> Iterator[tuple[str, sweep.Cell]]:
  """Every square of every family that has rows enough.

  Args:
    folder: Of the families.
  """
  config = sweep.SweepConfig(min_tokens=0)
  for name, runs in published.families(folder).items():
    if len(runs.sizes) < 3:
      continue
    for cell in sweep.cells(runs, config):
      if len(cell.seen) >= _MIN_ROWS:
        yield name, cell


def squares(
  constants: np.ndarray, problem: fit.Problem, logs: np.ndarray | None = None
) -> float:
  """Sum of squared residuals.

  Args:
    constants: E, A, B, alpha, beta.
    problem: The data.
    logs: log A and log B, where A and B overflow.
  """
  predicted = fit.predict(
    constants, problem.num_params, problem.num_tokens, logs=logs
  )
  return float(np.sum((predicted - problem.loss) ** 2))


def huber(
  constants: np.ndarray, problem: fit.Problem, logs: np.ndarray | None = None
) -> float:
  """Sum of Huber's function of log residuals.

  Args:
    constants: E, A, B, alpha, beta.
    problem: The data.
    logs: log A and log B, where A and B overflow.
  """
  predicted = fit.predict(
    constants, problem.num_params, problem.num_tokens, logs=logs
  )
  r = np.abs(np.log(predicted) - np.log(problem.loss))
  linear = _DELTA * (r - _DELTA / 2)
  return float(np.sum(np.where(r <= _DELTA, r * r / 2, linear)))


def multistart(problem: fit.Problem) -> np.ndarray:
  """The best of 24 starts of L-BFGS-B; E, A, B, alpha, beta.

  Args:
    problem: The data.
  """
  n, d = np.log(problem.num_params), np.log(problem.num_tokens)
  y = np.log(problem.loss)

  def objective(z: np.ndarray) -> tuple[float, np.ndarray]:
    parts = np.stack([np.full_like(n, z[0]), z[1] - z[3] * n, z[2] - z[4] * d])
    highest = parts.max(0)
    shares = np.exp(parts - highest)
    total = shares.sum(0)
    r = highest + np.log(total) - y
    shares /= total
    size = np.abs(r)
    value = np.where(
      size <= _DELTA, r * r / 2, _DELTA * (size - _DELTA / 2)
    ).sum()
    psi = np.clip(r, -_DELTA, _DELTA)
    e, a, b = shares @ psi
    slopes = -(psi * shares[1]) @ n, -(psi * shares[2]) @ d
    return value, np.array([e, a, b, *slopes])

  # What Hoffmann et al. 2022 (appendix D.3) and others start from, thinned.
  corners = (
    (5, 5, 0.3, 0.3),
    (10, 10, 0.5, 0.5),
    (5, 10, 0.3, 0.5),
    (10, 5, 0.5, 0.3),
    (0, 0, 0.1, 0.1),
    (15, 15, 0.8, 0.8),
    (20, 20, 1.2, 1.2),
    (5, 20, 0.3, 1.0),
  )
  bounds = [(-60.0, None)] * 3 + [(0.0, fit.LARGEST_EXPONENT)] * 2
  found = [
    optimize.minimize(
      objective,
      np.array([e, *corner], float),
      jac=True,
      method='L-BFGS-B',
      bounds=bounds,
    )
    for e in (0.0, 0.5, 1.0)
    for corner in corners
  ]
  e, a, b, alpha, beta = min(found, key=lambda one: one.fun).x
  return np.array([*np.exp([e, a, b]), alpha, beta])


def _note(family: str, loss: str, ours: float, theirs: float) -> dict[str, Any]:
  note = {'family': family, 'loss': loss, 'ours': ours, 'scipy': theirs}
  print(f'worse: {note}', file=sys.stderr, flush=True)
  return note


def _worse(ours: float, theirs: float, problem: fit.Problem) -> bool:
  floor = _ROUNDING * float(np.sum(problem.loss**2))
  return ours > theirs * (1 + _TOLERANCE) + floor


def compare(
  every: list[tuple[str, fit.Problem]], *, sample: int
) -> dict[str, Any]:
  """Solves all, and scipy all or a sample.

  Args:
    every: Families and their problems.
    sample: How many are solved from many starts by scipy.
  """
  alone = [problem for _, problem in every]
  by_squares, seconds, cpu = _timed(lambda: fit.solve(alone))
  by_huber, seconds_huber, cpu_huber = _timed(
    lambda: fit.solve(alone, loss='huber')
  )
  print(f'{seconds=:.1f} {seconds_huber=:.1f}', file=sys.stderr, flush=True)
  worse = []
  single = single_cpu = 0.0
  for i, (name, problem) in enumerate(every):
    rows = data_lib.make(problem.num_params, problem.num_tokens, problem.loss)
    constants, taken, taken_cpu = _timed(
      functools.partial(sweep.guide_fit, rows)
    )
    single, single_cpu = single + taken, single_cpu + taken_cpu
    if constants is None:
      continue
    ours = squares(by_squares.constants[i], problem, by_squares.logs[i])
    theirs = squares(constants, problem)
    if _worse(ours, theirs, problem):
      worse.append(_note(name, 'squared', ours, theirs))
  drawn = np.random.default_rng(0).permutation(len(every))[:sample]
  many = many_cpu = 0.0
  for i in drawn:
    name, problem = every[i]
    constants, taken, taken_cpu = _timed(functools.partial(multistart, problem))
    many, many_cpu = many + taken, many_cpu + taken_cpu
    ours = huber(by_huber.constants[i], problem, by_huber.logs[i])
    theirs = huber(constants, problem)
    if _worse(ours, theirs, problem):
      worse.append(_note(name, 'huber', ours, theirs))
  many *= len(every) / len(drawn)
  many_cpu *= len(every) / len(drawn)
  return {
    'num_fits': len(every),
    'num_rows': sum(map(len, alone)),
    'seconds': seconds,
    'seconds_huber': seconds_huber,
    'scipy_single_seconds': single,
    'scipy_multistart_seconds': many,
    'sample': len(drawn),
    'ratio_multistart': many / seconds_huber,
    'ratio_single': single / seconds,
    'cpu_seconds': cpu,
    'cpu_seconds_huber': cpu_huber,
    'scipy_single_cpu_seconds': single_cpu,
    'scipy_multistart_cpu_seconds': many_cpu,
    'cpu_ratio_multistart': many_cpu / cpu_huber,
    'cpu_ratio_single': single_cpu / cpu,
    'worse_than_scipy': len(worse),
    'worse': worse,
    'starts_agreeing_median': float(np.median(by_squares.agreeing)),
  }


def _timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
  """What it gives, seconds of wall time and of all cores together."""
  wall, cpu = time.perf_counter(), time.process_time()
  found = work()
  return found, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
  """Fits everything twice."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--data', type=pathlib.Path, default=published.DEFAULT_FOLDER
  )
  parser.add_argument('--quick', action='store_true', help='every 20th square')
  parser.add_argument('--sample', type=int, default=150)
  arguments = parser.parse_args()
  cells = problems(arguments.data)
  every = [(name, sweep.problem_of(cell.seen)) for name, cell in cells]
  if arguments.quick:
    every = every[::20]
  name = 'scaling_fit_quick' if arguments.quick else 'scaling_fit'
  result = compare(every, sample=arguments.sample)
  harness.record(name, {**result, 'load': os.getloadavg()[0]})


if __name__ == '__main__':
  main()
