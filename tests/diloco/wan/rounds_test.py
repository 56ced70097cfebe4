from efficient_llm.diloco.wan import rounds
from efficient_llm.diloco.wan.config import RoundConfig

_CONFIG = RoundConfig(quorum=0.5, grace_secs=10.0, deadline_secs=60.0)
_ALL = ('a', 'b', 'c', 'd')


def _closing(arrived: dict[str, float], now: float) -> rounds.Closing | None:
  return rounds.closing(_CONFIG, arrived=arrived, present=_ALL, now=now)


def test_nothing_closes_before_an_update_has_come() -> None:
  assert _closing({}, 1e9) is None


def test_a_round_closes_at_once_when_all_have_sent() -> None:
  found = _closing(dict.fromkeys(_ALL, 5.0), 5.0)
  assert found == rounds.Closing('all')


def test_the_others_have_the_grace_after_the_quorum() -> None:
  arrived = {'a': 0.0, 'b': 7.0}
  assert _closing(arrived, 16.9) is None
  assert _closing(arrived, 17.0) == rounds.Closing('grace', ('c', 'd'))


def test_below_the_quorum_only_the_deadline_closes() -> None:
  assert _closing({'a': 3.0}, 62.9) is None
  assert _closing({'a': 3.0}, 63.0) == rounds.Closing(
    'deadline', ('b', 'c', 'd')
  )


def test_who_is_not_waited_for_does_not_count_against_the_quorum() -> None:
  found = rounds.closing(_CONFIG, arrived={'a': 0.0}, present=('a',), now=0.0)
  assert found == rounds.Closing('all')
