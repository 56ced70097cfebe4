"""Tests of which steps a trace holds."""

import pathlib
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficient_llm.training import profiler


@given(first=st.integers(1, 8), length=st.integers(1, 8))
def test_a_trace_holds_its_range_and_no_other_step(
  first: int, length: int
) -> None:
  traced: list[int] = []
  is_on = False

  def switch(on: bool) -> Any:
    def call(*_: Any) -> None:
      nonlocal is_on
      assert is_on is not on
      is_on = on

    return call

  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(jax.profiler, 'start_trace', switch(True))
    patched.setattr(jax.profiler, 'stop_trace', switch(False))
    steps = (first, first + length - 1)
    with profiler.Profiler(steps, pathlib.Path('unused')) as trace:
      for step in range(1, 11):
        trace.before(step, state=None)
        if is_on:
          traced.append(step)
    assert not is_on
  assert traced == [s for s in range(first, first + length) if s <= 10]


def test_a_run_that_goes_on_behind_the_range_traces_nothing(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda _: pytest.fail())
  with profiler.Profiler((2, 5), pathlib.Path('unused')) as trace:
    trace.before(4, state=None)


def test_without_a_range_nothing_is_traced(tmp_path: pathlib.Path) -> None:
  with profiler.Profiler(None, tmp_path) as trace:
    trace.before(1, state=None)
  assert list(tmp_path.iterdir()) == []


@given(st.integers(1, 10**9), st.integers(0, 10**9))
def test_a_range_reads_back_as_it_was_written(first: int, more: int) -> None:
  last = first + more
  assert profiler.parse_range(f'{first}:{last}') == (first, last)
