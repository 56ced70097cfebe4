"""Idle periods are judged by the earlier ones."""

from efficient_llm.tlt import idle


def _periods(*secs: float) -> idle.IdlePeriods:
  periods = idle.IdlePeriods()
  for x in secs:
    periods.add(x)
  return periods


def test_with_few_known_periods_nothing_is_refused() -> None:
  assert _periods(*[0.1] * 7).has_room(0.0, 1.0)


def test_what_most_often_takes_longer_is_refused() -> None:
  periods = _periods(*[0.1] * 5, *[2.0] * 4)
  assert not periods.has_room(0.0, 0.2)
  assert periods.has_room(0.0, 0.05)


def test_only_periods_that_lasted_as_long_are_judged_by() -> None:
  periods = _periods(*[0.1] * 5, *[2.0] * 4)
  assert periods.has_room(0.5, 1.4)
  assert not periods.has_room(0.5, 1.6)


def test_a_period_longer_than_all_goes_on() -> None:
  assert _periods(*[0.1] * 9).has_room(0.2, 5.0)
