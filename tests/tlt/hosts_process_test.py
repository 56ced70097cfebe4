"""Several processes answer and learn what one would.

The processes are real, each with a device of its own, but on one machine.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm.speculative import target_run
from efficient_llm.tlt import rollout_config, start
from efficient_llm.training import metrics
from tests import binary
from tests.tlt import hosts_process, small_run

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_NGRAM = {'speculation': 'ngram'}
_LIMIT_SECS = 600


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A model to begin with."""
  folder = tmp_path_factory.mktemp('base')
  config = small_run.config(
    rollout=rollout_config.RolloutConfig(speculation='ngram')
  )
  start.prepare(config, folder)
  return folder


@pytest.fixture(scope='module')
def base_with_drafter(base: pathlib.Path) -> pathlib.Path:
  start.prepare(small_run.config(), base)
  return base


def _begin(
  count: int, base: pathlib.Path, workdir: pathlib.Path, **options: Any
) -> list[subprocess.Popen[str]]:
  """Starts a run of so many processes, which share two devices or more."""
  workdir.mkdir(exist_ok=True)
  port = binary.free_port()
  options = {
    'workdir': str(workdir),
    'checkpoint': str(base / 'supervised'),
    'drafter': str(base / 'first_drafter'),
    'num_devices': max(2, count),
    'num_steps': 2,
    **options,
  }
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(base / 'programs'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.05',
  }
  program = [sys.executable, '-m', hosts_process.__name__]
  return [
    subprocess.Popen(
      [*program, str(index), str(count), str(port), json.dumps(options)],
      cwd=_ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]


def _kill(started: list[subprocess.Popen[str]]) -> None:
  for process in started:
    process.kill()
    process.communicate()


def _answers(started: list[subprocess.Popen[str]]) -> list[str]:
  """What each process says at its end."""
  answers = []
  try:
    for process in started:
      output, errors = process.communicate(timeout=_LIMIT_SECS)
      # Gloo writes to the same stream, at times into the middle of a line.
      found = re.findall(r'answer: (.*)', output)
      assert found, errors
      answers += found
  finally:
    _kill(started)
  return answers


def _policy(workdir: pathlib.Path) -> Any:
  return target_run.find(workdir).restore_params(None)


def _check_same_policy(workdir: pathlib.Path, other: pathlib.Path) -> None:
  # The same program on as many devices, which here gives the same bits; a
  # network may sum in another order. A step changes parameters by 3e-3.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    _policy(workdir),
    _policy(other),
  )


def _check_same_lines(workdir: pathlib.Path, other: pathlib.Path) -> None:
  found, expected = (
    metrics.read_metrics(x, kind='train') for x in (workdir, other)
  )
  assert [x['step'] for x in found] == [x['step'] for x in expected]
  for name in ('reward', 'rollout_tokens', 'length_max', 'loss'):
    np.testing.assert_allclose(
      [x[name] for x in found], [x[name] for x in expected], atol=1e-6
    )


def _arrays(workdir: pathlib.Path, step: int, index: int) -> dict[str, Any]:
  with np.load(workdir / f'answers-{step}-{index}.npz') as found:
    return dict(found)


@pytest.mark.parametrize(
  'settings',
  [
    pytest.param({'speculation': 'off', 'max_live': 1}, marks=pytest.mark.slow),
    pytest.param({'speculation': 'union'}, marks=pytest.mark.slow),
  ],
)
def test_two_processes_answer_and_learn_as_one_does(
  request: pytest.FixtureRequest,
  tmp_path: pathlib.Path,
  settings: dict[str, Any],
) -> None:
  """Of three groups one process gets two."""
  with_drafter = settings['speculation'] == 'union'
  base = request.getfixturevalue(
    'base_with_drafter' if with_drafter else 'base'
  )
  options: dict[str, Any] = {'rollout': {**settings, 'num_prompts': 3}}
  two, one = tmp_path / 'two', tmp_path / 'one'
  started = _begin(2, base, two, **options) + _begin(1, base, one, **options)
  assert len(_answers(started)) == 3
  for step in range(2):
    expected = _arrays(one, step, 0)
    assert expected['tokens'].shape == (6, 16)
    assert (expected['lengths'] > 0).all()
    for index in range(2):
      found = _arrays(two, step, index)
      np.testing.assert_array_equal(found['tokens'], expected['tokens'])
      np.testing.assert_array_equal(found['lengths'], expected['lengths'])
      # Rows are decoded in batches of another size.
      np.testing.assert_allclose(
        found['log_probs'], expected['log_probs'], atol=1e-5
      )
  _check_same_lines(two, one)
  _check_same_policy(two, one)
  begun = _policy(base / 'supervised')
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), _policy(two), begun)
  assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.slow
def test_a_process_that_waits_trains_the_drafter_of_all(
  base_with_drafter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  started = _begin(
    2,
    base_with_drafter,
    tmp_path,
    slow_process=1,
    spot={'mode': 'adaptive', 'max_steps': 8},
  )
  first, second = _answers(started)
  assert first == second
  for line in metrics.read_metrics(tmp_path, kind='train'):
    # Two seconds are enough for all of them.
    assert line['drafter_steps'] >= 8
    assert line['drafter_staleness'] == 0
    assert 0 < line['idle_used_secs'] < line['idle_secs']


@pytest.mark.slow
def test_a_process_without_problems_learns_from_the_others_answers(
  base_with_drafter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  started = _begin(
    2,
    base_with_drafter,
    tmp_path,
    slow_process=0,
    rollout={'num_prompts': 1},
    spot={'mode': 'adaptive', 'max_steps': 8},
  )
  first, second = _answers(started)
  assert first == second
  lines = metrics.read_metrics(tmp_path, kind='train')
  # The second has nothing to learn from until a step has ended.
  assert lines[1]['drafter_steps'] >= 8


@pytest.mark.slow
def test_killed_processes_go_on_with_the_same_answers(
  base_with_drafter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Killed at any moment of a step, and continued by one process at last."""
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  _answers(_begin(2, base_with_drafter, whole, num_steps=6))

  def steps() -> int:
    path = killed / 'metrics.jsonl'
    return path.read_text().count('"train"') if path.is_file() else 0

  for wait in (0.0, 0.1):
    started, before = _begin(2, base_with_drafter, killed, num_steps=6), steps()
    end = time.monotonic() + _LIMIT_SECS
    # A start without a checkpoint takes back the line of the first step.
    while steps() <= before and time.monotonic() < end:
      time.sleep(0.01)
    time.sleep(wait)
    _kill(started)
    assert before < steps() < 6
  alone = tmp_path / 'alone'
  shutil.copytree(killed, alone)
  for count, workdir in ((2, killed), (1, alone)):
    _answers(_begin(count, base_with_drafter, workdir, num_steps=6))
    _check_same_lines(workdir, whole)
    _check_same_policy(workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('how', 'other', 'own'),
  [
    ('reward', 'process 1 failed: RewardError: .*nothing', 'RewardError: '),
    ('worker', 'process 1 failed: RuntimeError: no room', 'RuntimeError: no'),
    ('start', 'process 1 failed: ValueError: .*absent', 'ValueError: '),
  ],
)
def test_a_failure_in_one_process_ends_the_step_in_all(
  base: pathlib.Path, tmp_path: pathlib.Path, how: str, other: str, own: str
) -> None:
  started = _begin(
    2, base, tmp_path, rollout=_NGRAM, failing_process=1, failure=how
  )
  first, second = _answers(started)
  assert re.match(f'ProcessError: {other}', first)
  assert second.startswith(own)


@pytest.mark.slow
def test_a_process_that_hangs_is_named(
  base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  started = _begin(
    2,
    base,
    tmp_path,
    rollout=_NGRAM,
    failing_process=1,
    failure='hang',
    timeout_secs=30.0,
  )
  try:
    output = started[0].stdout
    assert output is not None
    # JAX lets it end only minutes after it has said so.
    said = next(x for x in iter(output.readline, '') if 'answer' in x)
  finally:
    _kill(started)
  assert 'process 1 must come within 30 s' in said
