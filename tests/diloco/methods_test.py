"""Tests of eager, delayed and pairwise rounds against plain vectors."""

from typing import Any

import numpy as np
import pytest

from efficient_llm.diloco import compression, outer
from efficient_llm.diloco.config import MembershipConfig
from efficient_llm.diloco.schedule import Schedule
from tests.diloco import toy_islands

_RATE, _MOMENTUM = 0.7, 0.9


def _assert_close(one: Any, other: Any) -> None:
  # Sums of a few float32 of size 1.
  np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def _start(islands: int) -> np.ndarray:
  return np.stack([toy_islands.flat(toy_islands.params())] * islands)


def _move(step: int, m: int) -> np.ndarray:
  return toy_islands.flat(toy_islands.random_moves(step, m))


def test_eager_updates_follow_the_published_algorithm() -> None:
  config = toy_islands.config(num_steps=12, islands=3, method='eager')
  theta, anchors = _start(3), _start(3)
  momentum, late = np.zeros_like(theta), None
  for step, (state, _) in enumerate(toy_islands.walk(config), start=1):
    for m in range(3):
      theta[m] += _move(step, m)
    if step % 4 == 0:
      own = anchors - theta
      gradient = own
      if late is not None:
        mean, before = late
        gradient = own / 3 + (mean - before / 3)
      late = own.mean(0), own
      momentum = _MOMENTUM * momentum + gradient
      anchors = anchors - _RATE * (gradient + _MOMENTUM * momentum)
      theta = anchors.copy()
    _assert_close(toy_islands.flat_islands(state.islands.params), theta)
    _assert_close(toy_islands.flat(state.params), anchors.mean(0))


@pytest.mark.parametrize('equal_steps', [False, True])
def test_updates_are_applied_as_they_arrive(equal_steps: bool) -> None:
  config = toy_islands.config(
    num_steps=16,
    method='delayed',
    outer=outer.OuterConfig(optimizer='delayed_nesterov', learning_rate=0.5),
    membership=MembershipConfig(speeds=(1.0, 0.5), equal_steps=equal_steps),
  )
  schedule = Schedule(config)
  theta, anchors = _start(2), _start(2)
  shared = anchors[0].copy()
  momentum, pending, count = np.zeros_like(shared), np.zeros_like(shared), 0
  for step, (state, _) in enumerate(toy_islands.walk(config), start=1):
    for m in range(2):
      theta[m] += _move(step, m) * schedule.trains(step)[m]
    for event in schedule.events(step):
      for m in np.flatnonzero(event.reached):
        gradient = anchors[m] - theta[m]
        if not gradient.any():
          continue
        pending, count = pending + gradient, count + 1
        if count % 2:
          shared = shared - 0.5 * gradient / 2
        else:
          momentum = _MOMENTUM * momentum + pending / 2
          shared = shared - 0.5 * (_MOMENTUM * momentum + gradient / 2)
          pending = np.zeros_like(pending)
        theta[m] = anchors[m] = shared
    _assert_close(toy_islands.flat(state.params), shared)
    _assert_close(toy_islands.flat_islands(state.islands.params), theta)


def test_pairs_follow_the_published_rule() -> None:
  config = toy_islands.config(
    num_steps=12,
    islands=5,
    method='noloco',
    outer=outer.OuterConfig(learning_rate=0.7, momentum=0.5),
  )
  schedule = Schedule(config)
  theta, phi = _start(5), _start(5)
  momentum = np.zeros_like(phi)
  for step, (state, _) in enumerate(toy_islands.walk(config), start=1):
    for m in range(5):
      theta[m] += _move(step, m)
    for event in schedule.events(step):
      with_partner = [[m, event.partners[m]] for m in range(5)]
      mean_move = np.array(
        [(theta - phi)[pair].mean(0) for pair in with_partner]
      )
      mean_phi = np.array([phi[pair].mean(0) for pair in with_partner])
      momentum = 0.5 * momentum + 0.7 * mean_move + 0.7 * (mean_phi - phi)
      phi = phi + momentum
      theta = phi.copy()
    _assert_close(toy_islands.flat_islands(state.islands.params), theta)
    _assert_close(toy_islands.flat(state.params), phi.mean(0))


@pytest.mark.parametrize('method', ['eager', 'noloco', 'delayed'])
def test_a_bad_island_does_not_spoil_the_others(method: Any) -> None:
  config = toy_islands.config(num_steps=12, islands=4, method=method)

  def moves(step: int, m: int) -> Any:
    bad = m == 3 and step == 2
    return {
      name: {'w': leaf['w'] * (np.nan if bad else 1)}
      for name, leaf in toy_islands.random_moves(step, m).items()
    }

  trace = list(toy_islands.walk(config, moves))
  assert trace[3][1][0]['codes_M'].tolist() == [0, 0, 0, 1]
  assert np.isfinite(toy_islands.flat(trace[-1][0].params)).all()
  own = toy_islands.flat_islands(trace[-1][0].islands.params)
  assert np.isfinite(own).all()


def test_of_the_largest_values_each_counts_the_islands_that_sent_it() -> None:
  """SparseLoCo: no momentum, what is not sent is owed and fades."""
  config = toy_islands.config(
    num_steps=8,
    outer=outer.OuterConfig(optimizer='sgd', learning_rate=1.0),
    compression=compression.CompressionConfig(
      'float32', block_size=2, density=0.5, error_decay=0.95
    ),
  )
  theta, shared = _start(2), _start(1)[0]
  owed = np.zeros_like(theta)
  # Pairs along the last axis: embedding 2+2, final_norm 2+1, layers 2+2+2.
  blocks = [[0, 1], [2, 3], [4, 5], [6], [7, 8], [9, 10], [11, 12]]
  for step, (state, _) in enumerate(toy_islands.walk(config), start=1):
    for m in range(2):
      theta[m] += _move(step, m)
    if step % 4 == 0:
      owed = 0.95 * owed + (shared - theta)
      sent = np.zeros_like(owed)
      for m in range(2):
        for block in blocks:
          best = max(block, key=lambda i, m=m: abs(owed[m, i]))
          sent[m, best] = owed[m, best]
      owed = owed - sent
      count = np.maximum((sent != 0).sum(0), 1)
      shared = shared - sent.sum(0) / count
      theta[:] = shared
    _assert_close(toy_islands.flat(state.params), shared)
