"""Tests of the training loop on a model that compiles in no time."""

import dataclasses
import functools
import json
import logging
import pathlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding
from efficient_llm.training import (
  checkpoint,
  loop,
  metrics,
  objectives,
  state,
  step,
)

_OPTIMIZER = optimizer_lib.Optimizer(optax.adam(0.1), lambda _: 0.1)
# What depends on the clock, so no two runs agree in it.
_CLOCK = {'time', 'step_secs', 'tokens_per_sec', 'mfu'}


class Crash(Exception):
  """Stands for whatever ends a process without warning."""


class Batches:
  """Random rows, by step; something may happen before one is handed out."""

  def __init__(self, happenings: Mapping[int, Callable[[], Any]]) -> None:
    self.happenings = dict(happenings)
    self.next_step = 0

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    self.next_step += 1
    x = np.random.default_rng(self.next_step).normal(size=(4, 3))
    if happening := self.happenings.get(self.next_step):
      x = x * (happening() or 1)
    return {'x': x.astype(np.float32)}

  def get_state(self) -> dict[str, Any]:
    return {'next_step': self.next_step, 'next_example': 4 * self.next_step}

  def set_state(self, state: Mapping[str, Any]) -> None:
    self.next_step = state['next_step']


def _loss(params: Any, batch: Any, key: jax.Array) -> objectives.Loss:
  noise = 0.01 * jax.random.normal(key, (3,))
  errors = jnp.square(params['w'] + noise - batch['x'])
  weight = jnp.float32(batch['x'].shape[0])
  return objectives.Loss(errors.sum(), weight, {'worst': errors.max() * weight})


def _make_state() -> state.TrainState:
  return state.create({'w': jnp.zeros(3)}, _OPTIMIZER, jax.random.key(3))


@functools.cache
def _jitted(skip_nonfinite: bool) -> step.TrainStep:
  train_step = step.make_train_step(
    _loss, _OPTIMIZER, skip_nonfinite=skip_nonfinite
  )
  return jax.jit(train_step, donate_argnums=0)


def _evaluate(state: state.TrainState) -> dict[str, float]:
  return {'loss': float(jnp.square(state.params['w']).sum())}


def _run(
  workdir: pathlib.Path,
  *,
  happenings: Mapping[int, Callable[[], Any]] | None = None,
  every_steps: int = 4,
  task: Mapping[str, Any] | None = None,
  **config: Any,
) -> loop.Outcome:
  """Ten steps, a line every three, evaluated every five, saved every four."""
  fields = {'num_steps': 10, 'log_every': 3, 'eval_every': 5, **config}
  loop_config = loop.LoopConfig(
    tensorboard=False,
    checkpoint=checkpoint.CheckpointConfig(
      every_steps=every_steps, max_to_keep=20
    ),
    **fields,
  )
  loop_config.validate()
  mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
  whole = sharding.replicated(mesh)
  return loop.run(
    loop_config,
    loop.Task(
      **{
        'title': 'toy',
        'step': _jitted(loop_config.nonfinite == 'skip'),
        'batches': Batches(happenings or {}),
        'place': lambda batch: jax.device_put(batch, whole),
        'evaluate': _evaluate,
        'metadata': {'config': {'name': 'toy', 'loop': {'num_steps': 10}}},
        **(task or {}),
      }
    ),
    make_state=lambda: jax.device_put(_make_state(), whole),
    abstract_state=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
      jax.eval_shape(_make_state),
    ),
    workdir=workdir,
  )


def _lines(workdir: pathlib.Path, kind: str | None = None) -> list[Any]:
  return [
    {name: value for name, value in line.items() if name not in _CLOCK}
    for line in metrics.read_metrics(workdir, kind=kind)
  ]


def _saved(workdir: pathlib.Path) -> list[int]:
  folders = (workdir / 'checkpoints').iterdir()
  return sorted(int(path.name) for path in folders if path.name.isdecimal())


def _crash() -> None:
  raise Crash


def _sigterm() -> None:
  signal.raise_signal(signal.SIGTERM)


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
  assert _lines(workdir) == _lines(other_workdir)


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
  """A run that nothing interrupts: its folder and its outcome."""
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, _run(workdir)


def test_lines_evaluations_and_checkpoints_come_when_configured(
  whole: Any,
) -> None:
  workdir, outcome = whole
  assert [x['step'] for x in _lines(workdir, 'train')] == [3, 6, 9, 10]
  assert [x['step'] for x in _lines(workdir, 'eval')] == [5, 10]
  assert _saved(workdir) == [4, 8, 10]
  assert outcome.state.step == 10
  assert outcome.stopped_by is None


def test_without_eval_every_only_the_end_is_evaluated(
  tmp_path: pathlib.Path,
) -> None:
  _run(tmp_path, eval_every=None)
  assert [x['step'] for x in _lines(tmp_path, 'eval')] == [10]


def test_a_line_holds_the_mean_since_the_line_before(
  whole: Any, tmp_path: pathlib.Path
) -> None:
  _run(tmp_path, log_every=1)
  each = [x['loss'] for x in _lines(tmp_path, 'train')]
  means = [x['loss'] for x in _lines(whole[0], 'train')]
  np.testing.assert_allclose(means[:3], np.reshape(each[:9], (3, 3)).mean(1))
  assert means[3] == each[9]


def test_an_evaluation_between_two_lines_counts_the_tokens_so_far(
  whole: Any,
) -> None:
  assert [x['tokens'] for x in _lines(whole[0], 'eval')] == [20, 40]
  assert [x['tokens'] for x in _lines(whole[0], 'train')] == [12, 24, 36, 40]


@pytest.mark.parametrize('crash_step', range(1, 11))
def test_a_run_that_crashed_at_any_step_continues_to_the_same_end(
  whole: Any, tmp_path: pathlib.Path, crash_step: int
) -> None:
  with pytest.raises(Crash):
    _run(tmp_path, happenings={crash_step: _crash})
  _assert_same_run(tmp_path, _run(tmp_path), *whole)


@pytest.mark.parametrize('stop_step', range(1, 10))
def test_a_run_that_was_stopped_at_any_step_continues_to_the_same_end(
  whole: Any, tmp_path: pathlib.Path, stop_step: int
) -> None:
  stopped = _run(tmp_path, happenings={stop_step: _sigterm})
  assert stopped.stopped_by == 'SIGTERM'
  assert stopped.state.step == stop_step
  assert _saved(tmp_path)[-1] == stop_step
  _assert_same_run(tmp_path, _run(tmp_path), *whole)


@settings(max_examples=8)
@given(stops=st.sets(st.integers(1, 9), min_size=2))
def test_any_number_of_stops_leads_to_the_same_end(
  whole: Any, tmp_path_factory: pytest.TempPathFactory, stops: set[int]
) -> None:
  workdir = tmp_path_factory.mktemp('stops')
  happenings = dict.fromkeys(stops, _sigterm)
  for stop in sorted(stops):
    assert _run(workdir, happenings=happenings).state.step == stop
  _assert_same_run(workdir, _run(workdir), *whole)


def test_a_kill_between_a_line_and_its_checkpoint_leaves_no_second_line(
  tmp_path: pathlib.Path,
) -> None:
  with pytest.raises(Crash):
    _run(tmp_path, log_every=1, happenings={8: _crash})
  assert _lines(tmp_path, 'train')[-1]['step'] == 7
  assert _saved(tmp_path)[-1] == 4
  _run(tmp_path, log_every=1)
  steps = [x['step'] for x in _lines(tmp_path, 'train')]
  assert steps == list(range(1, 11))


def test_a_signal_while_the_first_step_compiles_stops_after_it(
  tmp_path: pathlib.Path,
) -> None:
  def compiling(*arguments: Any) -> Any:
    _sigterm()
    return _jitted(False)(*arguments)

  outcome = _run(tmp_path, task={'step': compiling})
  assert outcome.stopped_by == 'SIGTERM'
  assert _saved(tmp_path) == [1]


def test_a_signal_during_evaluation_stops_after_it(
  tmp_path: pathlib.Path,
) -> None:
  def evaluate(state: Any) -> Any:
    _sigterm()
    return _evaluate(state)

  outcome = _run(tmp_path, task={'evaluate': evaluate})
  assert outcome.stopped_by == 'SIGTERM'
  assert [x['step'] for x in _lines(tmp_path, 'eval')] == [5]
  assert _saved(tmp_path) == [4, 5]


def test_a_signal_while_a_checkpoint_is_made_keeps_that_checkpoint(
  tmp_path: pathlib.Path,
) -> None:
  class Signalling(Batches):
    is_signalled = False

    def get_state(self) -> dict[str, Any]:
      # Only once: a second signal has its usual effect.
      if not self.is_signalled:
        self.is_signalled = True
        _sigterm()
      return super().get_state()

  outcome = _run(tmp_path, task={'batches': Signalling({})})
  assert outcome.stopped_by == 'SIGTERM'
  assert _saved(tmp_path) == [4]


def test_a_signal_before_the_first_step_saves_and_evaluates_nothing_more(
  tmp_path: pathlib.Path,
) -> None:
  def evaluate(_: Any) -> Any:
    raise AssertionError('evaluated')

  class Signalling(Batches):
    def set_state(self, state: Any) -> None:
      _sigterm()
      super().set_state(state)

  _run(tmp_path, happenings={6: _sigterm})
  task = {'batches': Signalling({}), 'evaluate': evaluate}
  outcome = _run(tmp_path, task=task)
  assert outcome.stopped_by == 'SIGTERM'
  assert _saved(tmp_path) == [4, 6]


def test_ctrl_c_stops_as_sigterm_does_and_the_second_one_interrupts(
  tmp_path: pathlib.Path,
) -> None:
  def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)

  outcome = _run(tmp_path, happenings={3: ctrl_c})
  assert outcome.stopped_by == 'SIGINT'
  with pytest.raises(KeyboardInterrupt):
    _run(tmp_path, happenings={6: lambda: (ctrl_c(), ctrl_c())})
  assert _saved(tmp_path)[-1] == 4


def test_the_handlers_are_as_before_after_a_run(tmp_path: pathlib.Path) -> None:
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  _run(tmp_path, happenings={2: _sigterm})
  after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  assert before == after


def test_a_finished_run_started_again_trains_no_step_and_reports_the_same(
  tmp_path: pathlib.Path,
) -> None:
  first = _run(tmp_path)
  content = (tmp_path / 'metrics.jsonl').read_bytes()

  def step(*_: Any) -> Any:
    raise AssertionError('trained')

  again = _run(tmp_path, task={'step': step})
  jax.tree.map(np.testing.assert_array_equal, again.state, first.state)
  assert again.eval_metrics == first.eval_metrics
  assert again.num_tokens == first.num_tokens
  assert again.train_secs == first.train_secs
  assert again.stopped_by is None
  assert (tmp_path / 'metrics.jsonl').read_bytes() == content
  assert _saved(tmp_path) == [4, 8, 10]


def test_more_steps_continue_a_finished_run(
  tmp_path: pathlib.Path, whole: Any
) -> None:
  _run(tmp_path, num_steps=6)
  outcome = _run(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, outcome.state, whole[1].state)
  # Step 6 ended the shorter run and has a line in the longer one too.
  assert _lines(tmp_path, 'train') == _lines(whole[0], 'train')


def test_tokens_and_seconds_add_up_over_resumptions(
  tmp_path: pathlib.Path,
) -> None:
  first = _run(tmp_path, happenings={7: _sigterm})
  second = _run(tmp_path)
  assert (first.num_tokens, second.num_tokens) == (28, 40)
  assert second.train_secs > first.train_secs > 0


def test_resuming_says_step_next_example_and_what_differs(
  tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  _run(tmp_path, num_steps=4)
  changed = {'config': {'name': 'toy', 'loop': {'num_steps': 12}}}
  with caplog.at_level(logging.INFO, logger='absl'):
    _run(tmp_path, task={'metadata': changed})
  assert 'Resumed at step 4 of 10; next example: 16.' in caplog.messages
  assert (
    'Configuration changed since the checkpoint: loop.num_steps: 10 -> 12'
    in caplog.messages
  )


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(
  tmp_path: pathlib.Path,
) -> None:
  with pytest.raises(loop.NonFiniteError) as error:
    _run(tmp_path, happenings={7: lambda: np.nan})
  assert 'step=7; the last good checkpoint is step 4;' in str(error.value)
  assert '\n' not in str(error.value)
  assert _saved(tmp_path) == [4]


@pytest.mark.parametrize('bad_step', range(1, 11))
def test_no_checkpoint_holds_what_a_bad_step_has_spoilt(
  tmp_path: pathlib.Path, bad_step: int
) -> None:
  with pytest.raises(loop.NonFiniteError):
    _run(
      tmp_path,
      every_steps=1,
      log_every=100,
      happenings={bad_step: lambda: np.inf},
    )
  assert _saved(tmp_path) == list(range(1, bad_step))


def test_a_bad_step_is_not_evaluated(tmp_path: pathlib.Path) -> None:
  with pytest.raises(loop.NonFiniteError):
    _run(tmp_path, happenings={5: lambda: np.nan})
  assert _lines(tmp_path, 'eval') == []


def test_skipping_goes_on_and_counts_what_was_skipped(
  tmp_path: pathlib.Path,
) -> None:
  outcome = _run(tmp_path, nonfinite='skip', happenings={5: lambda: np.nan})
  lines = _lines(tmp_path, 'train')
  assert [x['skipped'] for x in lines] == [0, 1, 0, 0]
  assert all(np.isfinite(x['loss']) for x in lines)
  assert outcome.num_tokens == 36
  assert np.isfinite(outcome.state.params['w']).all()


def test_a_resumed_run_with_skipped_steps_ends_like_an_uninterrupted_one(
  tmp_path: pathlib.Path,
) -> None:
  bad: dict[int, Any] = {number: lambda: np.nan for number in (4, 5, 6, 8)}
  options: dict[str, Any] = {'nonfinite': 'skip'}
  whole = _run(tmp_path / 'whole', happenings=bad, **options)
  crashing = {**bad, 7: _sigterm}
  _run(tmp_path / 'parts', happenings=crashing, **options)
  resumed = _run(tmp_path / 'parts', happenings=bad, **options)
  _assert_same_run(tmp_path / 'parts', resumed, tmp_path / 'whole', whole)
  assert np.isnan(_lines(tmp_path / 'whole', 'train')[1]['loss'])


def test_profile_steps_writes_a_trace_of_these_steps(
  tmp_path: pathlib.Path,
) -> None:
  outcome = _run(tmp_path, profile_steps='3:4')
  assert outcome.state.step == 10
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_a_trace_of_the_last_steps_is_written_too(
  tmp_path: pathlib.Path,
) -> None:
  _run(tmp_path, profile_steps='10:10')
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


@pytest.mark.parametrize(
  'text', ['', '3', '3:', ':4', '5:3', '0:3', 'a:b', '1:2:3', '-1:3', '²:3']
)
def test_a_profile_range_that_is_none_is_refused_in_one_line(text: str) -> None:
  with pytest.raises(ValueError, match='profile_steps') as error:
    loop.LoopConfig(profile_steps=text).validate()
  assert '\n' not in str(error.value)
  assert 'for example' in str(error.value)


def test_a_profile_of_steps_that_never_come_is_refused() -> None:
  with pytest.raises(ValueError, match=r'loop\.num_steps=10'):
    loop.LoopConfig(num_steps=10, profile_steps='9:11').validate()


@pytest.mark.parametrize(
  'field',
  ['num_steps', 'num_microbatches', 'log_every', 'eval_every', 'eval_batches'],
)
def test_a_count_below_one_is_refused_by_name(field: str) -> None:
  config = dataclasses.replace(loop.LoopConfig(), **{field: 0})
  with pytest.raises(ValueError, match=rf'loop\.{field}=0'):
    config.validate()


def test_the_state_of_another_model_is_refused_and_the_folder_left_alone(
  tmp_path: pathlib.Path,
) -> None:
  _run(tmp_path, num_steps=4)
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  with pytest.raises(ValueError, match='is of another model: leaf params/v'):
    loop.run(
      loop.LoopConfig(num_steps=8, tensorboard=False),
      loop.Task('toy', _jitted(False), Batches({}), lambda batch: batch),
      make_state=lambda: None,
      abstract_state={'params': {'v': jax.ShapeDtypeStruct((3,), np.float32)}},
      workdir=tmp_path,
    )
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before
  assert _saved(tmp_path) == [4]


def test_a_checkpoint_s_metadata_can_be_read_without_the_arrays(
  whole: Any,
) -> None:
  text = (whole[0] / 'checkpoints' / '10' / 'metadata.json').read_text()
  found = json.loads(text)
  assert found['config']['name'] == 'toy'
  assert found['counters']['num_tokens'] == 40


def test_differences_names_every_field_that_changed() -> None:
  old = {'a': 1, 'b': {'c': 2, 'd': [1]}, 'gone': True}
  new = {'a': 1, 'b': {'c': 3, 'd': [1]}, 'came': 'x'}
  assert loop.differences(old, new) == [
    'b.c: 2 -> 3',
    'came: None -> x',
    'gone: True -> None',
  ]
