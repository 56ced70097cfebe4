import json
import pathlib

import pytest

from benchmarks import harness


def test_arms_take_turns_in_both_orders() -> None:
  calls: list[str] = []
  seconds = harness.alternate(
    {'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')}, rounds=3
  )
  assert calls == ['a', 'b', 'b', 'a', 'a', 'b']
  assert {name: len(times) for name, times in seconds.items()} == {
    'a': 3,
    'b': 3,
  }


def test_a_record_is_stored_and_printed_on_one_last_line(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.setattr(harness, '_RESULTS', tmp_path / 'results')
  harness.record('claim', {'undetected': 0, 'seed': 3})
  printed = json.loads(capsys.readouterr().out.splitlines()[-1])
  stored = json.loads((tmp_path / 'results' / 'claim.json').read_text())
  assert printed == stored
  assert printed['benchmark'] == 'claim'
  assert printed['undetected'] == 0
  assert printed['device']['platform'] == 'cpu'
  assert {'python', 'jax', 'jaxlib', 'flax', 'optax'} <= set(
    printed['versions']
  )
  assert set(printed['commit']) == {'hash', 'dirty'}


def test_a_result_may_not_hide_where_it_was_measured() -> None:
  with pytest.raises(ValueError, match=r"\['commit'\]"):
    harness.record('claim', {'commit': 'another'})
