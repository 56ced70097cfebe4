"""Tests of the training loop: what happens when, and bad steps."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from efficient_llm.training import loop
from tests import toy_run


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
  """A run that nothing interrupts: its folder and its outcome."""
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, toy_run.run(workdir)


def test_lines_evaluations_and_checkpoints_come_when_configured(
  whole: Any,
) -> None:
  workdir, outcome = whole
  assert [x['step'] for x in toy_run.lines(workdir, 'train')] == [3, 6, 9, 10]
  assert [x['step'] for x in toy_run.lines(workdir, 'eval')] == [5, 10]
  assert toy_run.saved_steps(workdir) == [4, 8, 10]
  assert outcome.state.step == 10
  assert outcome.stopped_by is None


def test_without_eval_every_only_the_end_is_evaluated(
  tmp_path: pathlib.Path,
) -> None:
  toy_run.run(tmp_path, eval_every=None)
  assert [x['step'] for x in toy_run.lines(tmp_path, 'eval')] == [10]


def test_the_beginning_is_evaluated_once_where_that_is_asked_for(
  tmp_path: pathlib.Path,
) -> None:
  toy_run.run(tmp_path, eval_every=None, eval_first=True)
  toy_run.run(tmp_path, eval_every=None, eval_first=True, num_steps=12)
  found = toy_run.lines(tmp_path, 'eval')
  assert [x['step'] for x in found] == [0, 10, 12]
  assert found[0]['tokens'] == 0


def test_a_line_holds_the_mean_since_the_line_before(
  whole: Any, tmp_path: pathlib.Path
) -> None:
  toy_run.run(tmp_path, log_every=1)
  each = [x['loss'] for x in toy_run.lines(tmp_path, 'train')]
  means = [x['loss'] for x in toy_run.lines(whole[0], 'train')]
  np.testing.assert_allclose(means[:3], np.reshape(each[:9], (3, 3)).mean(1))
  assert means[3] == each[9]


def test_an_evaluation_between_two_lines_counts_the_tokens_so_far(
  whole: Any,
) -> None:
  assert [x['tokens'] for x in toy_run.lines(whole[0], 'eval')] == [20, 40]
  assert [x['tokens'] for x in toy_run.lines(whole[0], 'train')] == [
    12,
    24,
    36,
    40,
  ]


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(
  tmp_path: pathlib.Path,
) -> None:
  with pytest.raises(loop.NonFiniteError) as error:
    toy_run.run(tmp_path, happenings={7: lambda: np.nan})
  assert 'step=7; the last good checkpoint is step 4;' in str(error.value)
  assert '\n' not in str(error.value)
  assert toy_run.saved_steps(tmp_path) == [4]


@pytest.mark.parametrize('bad_step', range(1, 11))
def test_no_checkpoint_holds_what_a_bad_step_has_spoilt(
  tmp_path: pathlib.Path, bad_step: int
) -> None:
  with pytest.raises(loop.NonFiniteError):
    toy_run.run(
      tmp_path,
      every_steps=1,
      log_every=100,
      happenings={bad_step: lambda: np.inf},
    )
  assert toy_run.saved_steps(tmp_path) == list(range(1, bad_step))


def test_a_bad_step_is_not_evaluated(tmp_path: pathlib.Path) -> None:
  with pytest.raises(loop.NonFiniteError):
    toy_run.run(tmp_path, happenings={5: lambda: np.nan})
  assert toy_run.lines(tmp_path, 'eval') == []


def test_skipping_goes_on_and_counts_what_was_skipped(
  tmp_path: pathlib.Path,
) -> None:
  outcome = toy_run.run(
    tmp_path, nonfinite='skip', happenings={5: lambda: np.nan}
  )
  lines = toy_run.lines(tmp_path, 'train')
  assert [x['skipped'] for x in lines] == [0, 1, 0, 0]
  assert all(np.isfinite(x['loss']) for x in lines)
  assert outcome.num_tokens == 36
  assert np.isfinite(outcome.state.params['w']).all()


def test_profile_steps_writes_a_trace_of_these_steps(
  tmp_path: pathlib.Path,
) -> None:
  outcome = toy_run.run(tmp_path, profile_steps='3:4')
  assert outcome.state.step == 10
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_a_trace_of_the_last_steps_is_written_too(
  tmp_path: pathlib.Path,
) -> None:
  toy_run.run(tmp_path, profile_steps='10:10')
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


def test_a_metric_of_some_steps_is_averaged_over_those(
  tmp_path: pathlib.Path,
) -> None:
  step = toy_run.jitted(False)

  def sometimes(state: Any, batch: Any) -> tuple[Any, Any]:
    is_third = int(state.step) == 2
    state, values = step(state, batch)
    return state, {**values, **({'rare': 5.0} if is_third else {})}

  toy_run.run(tmp_path, task={'step': sometimes})
  lines = toy_run.lines(tmp_path, 'train')
  assert [line.get('rare') for line in lines] == [5.0, None, None, None]


def test_a_technique_may_read_its_metrics_on_the_host(
  tmp_path: pathlib.Path,
) -> None:
  step = toy_run.jitted(False)

  def in_a_tuple(state: Any, batch: Any) -> tuple[Any, Any]:
    state, values = step(state, batch)
    return state, (values, 7)

  def read(values: Any) -> Any:
    return {**values[0], 'extra': values[1]}

  toy_run.run(tmp_path, task={'step': in_a_tuple, 'read': read})
  assert {line['extra'] for line in toy_run.lines(tmp_path, 'train')} == {7}
