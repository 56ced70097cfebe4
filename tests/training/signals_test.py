"""Tests of stop requests: first signal, second signal, several processes."""

import os
import signal
import threading

import jax
import pytest

from efficient_llm.training import signals


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_only_remembered(number: signal.Signals) -> None:
  with signals.StopRequest() as stop:
    assert not stop.is_set(0)
    os.kill(os.getpid(), number)
    assert stop.is_set(1)
    assert stop.signal_name == number.name


def test_the_second_ctrl_c_has_its_usual_effect() -> None:
  with signals.StopRequest() as stop:
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    assert stop.is_set(1)


def test_handlers_come_back_at_the_end_whatever_happens() -> None:
  def handler(*_: object) -> None: ...

  numbers = (signal.SIGINT, signal.SIGTERM)
  before = [signal.signal(number, handler) for number in numbers]
  try:
    with pytest.raises(ZeroDivisionError), signals.StopRequest():
      assert signal.getsignal(signal.SIGTERM) is not handler
      raise ZeroDivisionError
    assert [signal.getsignal(number) for number in numbers] == [handler] * 2
  finally:
    for number, previous in zip(numbers, before, strict=True):
      signal.signal(number, previous)


def test_outside_the_main_thread_nothing_is_installed() -> None:
  before = signal.getsignal(signal.SIGTERM)
  found = []

  def use() -> None:
    with signals.StopRequest() as stop:
      found.append((stop.is_set(0), signal.getsignal(signal.SIGTERM)))

  thread = threading.Thread(target=use)
  thread.start()
  thread.join()
  assert found == [(False, before)]


def test_with_several_processes_ctrl_c_goes_to_the_preemption_service(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  received = []
  before = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
  try:
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with signals.StopRequest():
      signal.raise_signal(signal.SIGINT)
    assert received == [1]
  finally:
    signal.signal(signal.SIGTERM, before)
