"""A fixture for tests of refusals."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from experiments import exits


@pytest.fixture
def guard_handlers() -> Iterator[None]:
  """`exits.guarded` answers SIGTERM, which pytest must not."""
  before = signal.getsignal(signal.SIGTERM)
  yield
  signal.signal(signal.SIGTERM, before)


@pytest.fixture
def refusal(
  capsys: pytest.CaptureFixture[str], guard_handlers: None
) -> Callable[[Callable[[], Any]], str]:
  """Runs a task that must be refused, in one line, and returns the line."""
  del guard_handlers

  def run(task: Callable[[], Any]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
      exits.guarded(task)
    assert exit_info.value.code == exits.BAD_INPUT
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith('error: ')]
    assert len(errors) == 1
    assert lines[-1] == errors[0]
    return errors[0]

  return run
