import pathlib
import threading

import pytest

from efficient_llm.diloco.wan import local_link


@pytest.fixture
def place(tmp_path: pathlib.Path) -> pathlib.Path:
  return tmp_path / 's'


def _ask(path: pathlib.Path, frame: bytes) -> list[bytes]:
  """Asks from another thread; the list fills when the answer is there."""
  answers: list[bytes] = []
  threading.Thread(
    target=lambda: answers.append(local_link.ask(path, frame, secs=20.0)),
    daemon=True,
  ).start()
  return answers


def _await(answers: list[bytes]) -> bytes:
  event = threading.Event()
  for _ in range(2000):
    if answers:
      return answers[0]
    event.wait(0.01)
  raise TimeoutError('no answer')


def test_a_message_is_answered_by_who_claims_it(place: pathlib.Path) -> None:
  with local_link.LocalLink(place, poll_secs=20.0, idle=lambda: None) as link:
    assert not link.claim()
    answers = _ask(place, b'x' * 3_000_000)
    assert link.poll(20.0) == b'x' * 3_000_000
    assert link.claim()
    link.answer(b'yes')
    assert _await(answers) == b'yes'


def test_a_message_is_answered_once_and_only_when_it_was_read(
  place: pathlib.Path,
) -> None:
  with local_link.LocalLink(place, poll_secs=20.0, idle=lambda: None) as link:
    first = _ask(place, b'a')
    assert link.poll(20.0) == b'a'
    assert link.claim()
    link.answer(b'1')
    # At once, whether the answer has been fetched or not.
    assert not link.claim()
    with pytest.raises(RuntimeError, match='no message is claimed'):
      link.answer(b'for the next one')
    assert _await(first) == b'1'
    second = _ask(place, b'b')
    assert not link.claim()
    assert link.poll(20.0) == b'b'
    assert link.claim()
    link.answer(b'2')
    assert _await(second) == b'2'


def test_a_message_nobody_answers_is_answered_that_there_is_nothing(
  place: pathlib.Path,
) -> None:
  with local_link.LocalLink(place, poll_secs=0.05, idle=lambda: b'-') as link:
    answers = _ask(place, b'a')
    assert link.poll(20.0) == b'a'
    assert _await(answers) == b'-'
    answers = _ask(place, b'b')
    assert link.poll(20.0) == b'b'


def test_only_its_user_can_open_the_socket(place: pathlib.Path) -> None:
  with local_link.LocalLink(place, poll_secs=1.0, idle=lambda: None):
    assert place.stat().st_mode & 0o077 == 0
  assert not place.exists()


def test_a_link_that_is_broken_off_says_why(place: pathlib.Path) -> None:
  with local_link.LocalLink(place, poll_secs=1.0, idle=lambda: None) as link:
    link.break_off(ValueError('not let in'))
    with pytest.raises(ValueError, match='not let in'):
      link.poll()


def test_a_path_too_long_for_a_socket_is_refused() -> None:
  path = pathlib.Path('/', *['long'] * 30)
  with pytest.raises(ValueError, match='at most 100 characters'):
    local_link.LocalLink(path, poll_secs=1.0, idle=lambda: None)
