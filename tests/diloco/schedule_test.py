"""Tests of what happens when: golden schedules, absence, speeds, pairs."""

from typing import Any

import numpy as np
import pytest

from efficient_llm.diloco.config import MembershipConfig
from efficient_llm.diloco.fragments import FragmentConfig
from efficient_llm.diloco.schedule import Schedule
from tests.diloco import toy_islands


def _events(num_steps: int = 9, **changes: Any) -> list[str]:
  """Like '4:send0', for all steps."""
  config = toy_islands.config(num_steps=num_steps, **changes)
  return [
    f'{step}:{event.kind}{event.fragment}'
    for step in range(1, num_steps + 1)
    for event in Schedule(config).events(step)
  ]


def test_everything_is_sent_and_applied_at_each_sync_and_at_the_end() -> None:
  assert _events() == [
    '4:send0', '4:apply0', '8:send0', '8:apply0', '9:send0', '9:apply0'
  ]  # fmt: skip


def test_a_run_that_ends_with_a_sync_sends_once() -> None:
  assert _events(8)[2:] == ['8:send0', '8:apply0']


def test_fragments_are_sent_at_even_distances_and_applied_later() -> None:
  fragments = FragmentConfig(count=2, overlap_steps=1)
  assert _events(8, fragments=fragments) == [
    '2:send1', '3:apply1', '4:send0', '5:apply0', '6:send1', '7:apply1',
    '8:send0', '8:apply0', '8:send1', '8:apply1',
  ]  # fmt: skip


def test_what_is_under_way_at_the_end_is_applied_before_the_rest_is_sent() -> (
  None
):
  fragments = FragmentConfig(count=1, overlap_steps=3)
  assert _events(6, fragments=fragments) == [
    '4:send0', '6:apply0', '6:send0', '6:apply0'
  ]  # fmt: skip


def test_an_absent_island_does_not_train() -> None:
  config = toy_islands.config(membership=MembershipConfig(absences=('1:3:4',)))
  schedule = Schedule(config)
  trained = [bool(schedule.trains(step)[1]) for step in range(1, 7)]
  assert trained == [True, True, False, False, True, True]
  assert schedule.events(4)[-1].kind == 'join'
  assert schedule.events(4)[-1].reached == (False, True)


def test_a_slow_island_makes_its_share_of_the_steps() -> None:
  membership = MembershipConfig(speeds=(3.0, 1.0))
  schedule = Schedule(toy_islands.config(membership=membership))
  trained = np.array([schedule.trains(step) for step in range(1, 301)])
  assert trained.sum(0).tolist() == [300, 100]


@pytest.mark.parametrize(
  ('equal_steps', 'expected'),
  [(False, [4, 8, 12, 16]), (True, [8, 16])],
)
def test_a_slow_island_sends_after_fewer_steps_or_later(
  equal_steps: bool, expected: list[int]
) -> None:
  membership = MembershipConfig(speeds=(1.0, 0.5), equal_steps=equal_steps)
  config = toy_islands.config(
    num_steps=20, method='delayed', membership=membership
  )
  sent = [
    step
    for step in range(1, 20)
    for event in Schedule(config).events(step)
    if event.reached[1]
  ]
  assert sent == expected


def test_drops_are_the_same_in_every_process_and_as_frequent_as_asked() -> None:
  config = toy_islands.config(
    num_steps=4001,
    membership=MembershipConfig(drop_probability=0.3),
  )

  def reached() -> np.ndarray:
    schedule = Schedule(config)
    steps = range(4, 4001, 4)
    return np.array([schedule.events(step)[0].reached for step in steps])

  np.testing.assert_array_equal(reached(), reached())
  # 2000 draws: a standard deviation is 0.01.
  assert reached().mean() == pytest.approx(0.7, abs=0.04)


@pytest.mark.parametrize('islands', [4, 5])
def test_pairs_are_mutual_and_change(islands: int) -> None:
  config = toy_islands.config(num_steps=100, islands=islands, method='noloco')
  pairs = [Schedule(config).events(step)[0].partners for step in (4, 8, 12)]
  for partners in pairs:
    assert [partners[partners[m]] for m in range(islands)] == list(
      range(islands)
    )
    alone = sum(partners[m] == m for m in range(islands))
    assert alone == islands % 2
  assert len(set(pairs)) > 1
