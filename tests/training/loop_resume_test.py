"""Tests of interrupted runs: signals, crashes, and what a run goes on with."""

import logging
import pathlib
import signal
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_llm.training import loop
from tests import toy_run


def _assert_same_run(
  workdir: pathlib.Path,
  outcome: loop.Outcome,
  other_workdir: pathlib.Path,
  other: loop.Outcome,
) -> None:
  """Bit for bit: state, counts, evaluation, lines."""
  jax.tree.map(np.testing.assert_array_equal, outcome.state, other.state)
  assert outcome.num_tokens == other.num_tokens
  assert outcome.eval_metrics == other.eval_metrics
  assert toy_run.lines(workdir) == toy_run.lines(other_workdir)


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
  """A run that nothing interrupts: its folder and its outcome."""
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, toy_run.run(workdir)


@pytest.mark.parametrize('crash_step', range(1, 11))
def test_a_run_that_crashed_at_any_step_continues_to_the_same_end(
  whole: Any, tmp_path: pathlib.Path, crash_step: int
) -> None:
  with pytest.raises(toy_run.Crash):
    toy_run.run(tmp_path, happenings={crash_step: toy_run.crash})
  _assert_same_run(tmp_path, toy_run.run(tmp_path), *whole)


@pytest.mark.parametrize('stop_step', range(1, 10))
def test_a_run_that_was_stopped_at_any_step_continues_to_the_same_end(
  whole: Any, tmp_path: pathlib.Path, stop_step: int
) -> None:
  stopped = toy_run.run(tmp_path, happenings={stop_step: toy_run.sigterm})
  assert stopped.stopped_by == 'SIGTERM'
  assert stopped.state.step == stop_step
  assert toy_run.saved_steps(tmp_path)[-1] == stop_step
  _assert_same_run(tmp_path, toy_run.run(tmp_path), *whole)


@settings(max_examples=8)
@given(stops=st.sets(st.integers(1, 9), min_size=2))
def test_any_number_of_stops_leads_to_the_same_end(
  whole: Any, tmp_path_factory: pytest.TempPathFactory, stops: set[int]
) -> None:
  workdir = tmp_path_factory.mktemp('stops')
  happenings = dict.fromkeys(stops, toy_run.sigterm)
  for stop in sorted(stops):
    assert toy_run.run(workdir, happenings=happenings).state.step == stop
  _assert_same_run(workdir, toy_run.run(workdir), *whole)


def test_a_kill_between_a_line_and_its_checkpoint_leaves_no_second_line(
  tmp_path: pathlib.Path,
) -> None:
  with pytest.raises(toy_run.Crash):
    toy_run.run(tmp_path, log_every=1, happenings={8: toy_run.crash})
  assert toy_run.lines(tmp_path, 'train')[-1]['step'] == 7
  assert toy_run.saved_steps(tmp_path)[-1] == 4
  toy_run.run(tmp_path, log_every=1)
  steps = [x['step'] for x in toy_run.lines(tmp_path, 'train')]
  assert steps == list(range(1, 11))


def test_a_signal_while_the_first_step_compiles_stops_after_it(
  tmp_path: pathlib.Path,
) -> None:
  def compiling(*arguments: Any) -> Any:
    toy_run.sigterm()
    return toy_run.jitted(False)(*arguments)

  outcome = toy_run.run(tmp_path, task={'step': compiling})
  assert outcome.stopped_by == 'SIGTERM'
  assert toy_run.saved_steps(tmp_path) == [1]


def test_a_signal_during_evaluation_stops_after_it(
  tmp_path: pathlib.Path,
) -> None:
  def evaluate(state: Any) -> Any:
    toy_run.sigterm()
    return toy_run.evaluate(state)

  outcome = toy_run.run(tmp_path, task={'evaluate': evaluate})
  assert outcome.stopped_by == 'SIGTERM'
  assert [x['step'] for x in toy_run.lines(tmp_path, 'eval')] == [5]
  assert toy_run.saved_steps(tmp_path) == [4, 5]


def test_a_signal_while_a_checkpoint_is_made_keeps_that_checkpoint(
  tmp_path: pathlib.Path,
) -> None:
  class Signalling(toy_run.Batches):
    is_signalled = False

    def get_state(self) -> dict[str, Any]:
      # Only once: a second signal has its usual effect.
      if not self.is_signalled:
        self.is_signalled = True
        toy_run.sigterm()
      return super().get_state()

  outcome = toy_run.run(tmp_path, task={'batches': Signalling({})})
  assert outcome.stopped_by == 'SIGTERM'
  assert toy_run.saved_steps(tmp_path) == [4]


def test_a_signal_before_the_first_step_saves_and_evaluates_nothing_more(
  tmp_path: pathlib.Path,
) -> None:
  def evaluate(_: Any) -> Any:
    raise AssertionError('evaluated')

  class Signalling(toy_run.Batches):
    def set_state(self, state: Any) -> None:
      toy_run.sigterm()
      super().set_state(state)

  toy_run.run(tmp_path, happenings={6: toy_run.sigterm})
  task = {'batches': Signalling({}), 'evaluate': evaluate}
  outcome = toy_run.run(tmp_path, task=task)
  assert outcome.stopped_by == 'SIGTERM'
  assert toy_run.saved_steps(tmp_path) == [4, 6]


def test_ctrl_c_stops_as_sigterm_does_and_the_second_one_interrupts(
  tmp_path: pathlib.Path,
) -> None:
  def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)

  outcome = toy_run.run(tmp_path, happenings={3: ctrl_c})
  assert outcome.stopped_by == 'SIGINT'
  with pytest.raises(KeyboardInterrupt):
    toy_run.run(tmp_path, happenings={6: lambda: (ctrl_c(), ctrl_c())})
  assert toy_run.saved_steps(tmp_path)[-1] == 4


def test_the_handlers_are_as_before_after_a_run(tmp_path: pathlib.Path) -> None:
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  toy_run.run(tmp_path, happenings={2: toy_run.sigterm})
  after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  assert before == after


def test_a_finished_run_started_again_trains_no_step_and_reports_the_same(
  tmp_path: pathlib.Path,
) -> None:
  first = toy_run.run(tmp_path)
  content = (tmp_path / 'metrics.jsonl').read_bytes()

  def step(*_: Any) -> Any:
    raise AssertionError('trained')

  again = toy_run.run(tmp_path, task={'step': step})
  jax.tree.map(np.testing.assert_array_equal, again.state, first.state)
  assert again.eval_metrics == first.eval_metrics
  assert again.num_tokens == first.num_tokens
  assert again.train_secs == first.train_secs
  assert again.stopped_by is None
  assert (tmp_path / 'metrics.jsonl').read_bytes() == content
  assert toy_run.saved_steps(tmp_path) == [4, 8, 10]


def test_more_steps_continue_a_finished_run(
  tmp_path: pathlib.Path, whole: Any
) -> None:
  toy_run.run(tmp_path, num_steps=6)
  outcome = toy_run.run(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, outcome.state, whole[1].state)
  # Step 6 ended the shorter run and has a line in the longer one too.
  assert toy_run.lines(tmp_path, 'train') == toy_run.lines(whole[0], 'train')


def test_tokens_and_seconds_add_up_over_resumptions(
  tmp_path: pathlib.Path,
) -> None:
  first = toy_run.run(tmp_path, happenings={7: toy_run.sigterm})
  second = toy_run.run(tmp_path)
  assert (first.num_tokens, second.num_tokens) == (28, 40)
  assert second.train_secs > first.train_secs > 0


def test_resuming_says_step_next_example_and_what_differs(
  tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  toy_run.run(tmp_path, num_steps=4)
  changed = {'config': {'name': 'toy', 'loop': {'num_steps': 12}}}
  with caplog.at_level(logging.INFO, logger='absl'):
    toy_run.run(tmp_path, task={'metadata': changed})
  assert 'Resumed at step 4 of 10; next example: 16.' in caplog.messages
  assert (
    'Configuration changed since the checkpoint: loop.num_steps: 10 -> 12'
    in caplog.messages
  )


def test_a_resumed_run_with_skipped_steps_ends_like_an_uninterrupted_one(
  tmp_path: pathlib.Path,
) -> None:
  bad: dict[int, Any] = {number: lambda: np.nan for number in (4, 5, 6, 8)}
  options: dict[str, Any] = {'nonfinite': 'skip'}
  whole = toy_run.run(tmp_path / 'whole', happenings=bad, **options)
  crashing = {**bad, 7: toy_run.sigterm}
  toy_run.run(tmp_path / 'parts', happenings=crashing, **options)
  resumed = toy_run.run(tmp_path / 'parts', happenings=bad, **options)
  _assert_same_run(tmp_path / 'parts', resumed, tmp_path / 'whole', whole)
  assert np.isnan(toy_run.lines(tmp_path / 'whole', 'train')[1]['loss'])


def test_the_state_of_another_model_is_refused_and_the_folder_left_alone(
  tmp_path: pathlib.Path,
) -> None:
  toy_run.run(tmp_path, num_steps=4)
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  with pytest.raises(ValueError, match='is of another model: leaf params/v'):
    loop.run(
      loop.LoopConfig(num_steps=8, tensorboard=False),
      loop.Task(
        'toy', toy_run.jitted(False), toy_run.Batches({}), lambda batch: batch
      ),
      make_state=lambda: None,
      abstract_state={'params': {'v': jax.ShapeDtypeStruct((3,), np.float32)}},
      workdir=tmp_path,
    )
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before
  assert toy_run.saved_steps(tmp_path) == [4]
