"""Tests of how a binary ends."""

import errno
import functools
import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from efficient_llm.training import loop
from experiments import exits

Refusal = Callable[[Callable[[], Any]], str]

pytestmark = pytest.mark.usefixtures('guard_handlers')


def _disk_full(path: Any, text: str) -> int:
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_disk_that_fills_up_later_is_named_in_one_line(
  refusal: Refusal,
) -> None:
  line = refusal(functools.partial(_disk_full, 'metrics.jsonl', ''))
  assert 'metrics.jsonl cannot be written: No space left on device' in line


def test_an_error_of_a_library_is_a_defect_and_keeps_its_traceback() -> None:
  with pytest.raises(json.JSONDecodeError):
    exits.guarded(lambda: json.loads('{'))


def test_a_storage_error_of_another_kind_keeps_its_traceback() -> None:
  def task() -> int:
    raise OSError(errno.EIO, 'broken')

  with pytest.raises(OSError, match='broken'):
    exits.guarded(task)


def test_a_loss_that_is_not_finite_is_a_failure_of_one_line(
  capsys: pytest.CaptureFixture[str],
) -> None:
  def task() -> int:
    raise loop.NonFiniteError('at step=3')

  assert exits.guarded(task) == exits.FAILED
  assert capsys.readouterr().err == 'error: at step=3\n'


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_the_loop_ends_with_the_code_for_stopped(
  number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
  def task() -> int:
    signal.raise_signal(number)
    return 0

  assert exits.guarded(task) == exits.STOPPED
  assert 'the same command continues' in capsys.readouterr().err
