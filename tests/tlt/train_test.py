"""A whole run in small: stages, steps, resuming, what is left at the end.

Over 300 lines: all go on from one trained model, made once.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm import optimizer
from efficient_llm.speculative import (
  drafter_training,
  strategy_config,
  target_run,
)
from efficient_llm.tlt import (
  policy_loss,
  rewards,
  train,
)
from efficient_llm.tlt import start as start_lib
from efficient_llm.tlt.config import TltConfig
from efficient_llm.training import (
  checkpoint,
  interchange,
  metrics,
  trained_run,
)
from tests.tlt import small_run

_FUNCTIONS = 'tests.tlt.reward_functions'
# Whose rate does not depend on when a run is to end.
_CONSTANT = optimizer.OptimizerConfig(
  learning_rate=3e-3, warmup_steps=0, schedule='constant'
)


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A run of three steps from nothing."""
  workdir = tmp_path_factory.mktemp('tlt')
  assert train.train(small_run.config(), workdir=workdir).stopped_by is None
  return workdir


def _begin(whole_run: pathlib.Path) -> TltConfig:
  """Of a run that takes model and drafter from another."""
  return small_run.config(
    checkpoint=str(whole_run / 'supervised'),
    first_drafter=str(whole_run / 'first_drafter'),
  )


def test_a_run_leaves_policy_and_drafter_for_generation(
  whole_run: pathlib.Path,
) -> None:
  policy = target_run.find(whole_run)
  drafter = drafter_training.load(whole_run / 'drafter')
  assert drafter.meta['target']['digest'] == policy.digest
  assert policy.step == 3
  assert (whole_run / 'report.html').is_file()
  lines = metrics.read_metrics(whole_run, kind='train')
  assert [line['step'] for line in lines] == [1, 2, 3]
  for line in lines:
    # The trainer finds the probabilities that the sampler drew with.
    assert line['rollout_gap'] < 1e-4
    assert line['drafter_steps'] == 1
    assert line['drafter_staleness'] == 0


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
  whole_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = _begin(whole_run)
  short = dataclasses.replace(config, loop=small_run.loop_config(1, every=1))
  train.train(short, workdir=tmp_path)
  outcome = train.train(config, workdir=tmp_path)
  uninterrupted = target_run.find(whole_run).restore_params(None)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    jax.device_get(outcome.state.params),
    uninterrupted,
  )
  expected = metrics.read_metrics(whole_run, kind='train')
  found = metrics.read_metrics(tmp_path, kind='train')
  for name in ('reward', 'rollout_tokens', 'length_max'):
    assert [x[name] for x in found] == [x[name] for x in expected]


def test_plain_decoding_beside_it_is_measured_and_changes_nothing(
  whole_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = dataclasses.replace(
    _begin(whole_run), plain_every=2, loop=small_run.loop_config(2)
  )
  train.train(config, workdir=tmp_path)
  found = metrics.read_metrics(tmp_path, kind='train')
  expected = metrics.read_metrics(whole_run, kind='train')[:2]
  for name in ('reward', 'rollout_tokens', 'length_max'):
    assert [x[name] for x in found] == [x[name] for x in expected]
  measured = [x for x in found if 'plain_step_secs' in x]
  assert [x['step'] for x in measured] == [2]
  for line in measured:
    assert line['plain_same_tokens'] == 1
    assert line['plain_step_secs'] == pytest.approx(
      line['plain_rollout_secs'] + line['reward_secs'] + line['update_secs']
    )
    # Plain decoding is no part of the step, though the loop waits for it.
    assert line['step_secs'] == pytest.approx(
      line['rollout_secs']
      + line['reward_secs']
      + line['update_secs']
      + line['drafter_secs']
    )
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['speedup_step'] == pytest.approx(
    result['plain_step_secs'] / result['step_secs']
  )
  assert (
    'Speed against plain decoding' in (tmp_path / 'report.html').read_text()
  )


@pytest.mark.parametrize(
  ('speculation', 'arm', 'kind'),
  [('learned', '3_1_4c', 'copied'), ('ngram', '3_1_4s', 'sampled')],
)
def test_drafts_that_speculation_cannot_make_are_refused_at_once(
  speculation: Any, arm: str, kind: str
) -> None:
  strategy = strategy_config.StrategyConfig(arms=(arm,), thresholds=(1,))
  rollout = dataclasses.replace(
    small_run.config().rollout, speculation=speculation, strategy=strategy
  )
  with pytest.raises(ValueError, match=f'drafts nothing {kind}'):
    small_run.config(rollout=rollout).validate()


@pytest.mark.parametrize(
  'changes', [{'speculation': 'off'}, {'finish_share': 0.5}]
)
def test_plain_decoding_is_measured_of_whole_steps_only(
  changes: dict[str, Any],
) -> None:
  rollout = dataclasses.replace(small_run.config().rollout, **changes)
  with pytest.raises(ValueError, match='plain_every=2 compares'):
    small_run.config(rollout=rollout, plain_every=2).validate()


@pytest.mark.parametrize(
  'algorithm',
  [pytest.param(x, marks=pytest.mark.slow) for x in ('dr_grpo', 'gspo')],
)
def test_every_algorithm_makes_several_updates_with_a_reference(
  whole_run: pathlib.Path, tmp_path: pathlib.Path, algorithm: Any
) -> None:
  config = _begin(whole_run)
  settings = dataclasses.replace(
    config.update,
    num_updates=2,
    policy=policy_loss.PolicyLossConfig(algorithm=algorithm, kl_weight=0.1),
  )
  outcome = train.train(
    dataclasses.replace(config, update=settings, loop=small_run.loop_config(1)),
    workdir=tmp_path,
  )
  assert int(outcome.state.num_updates) == 2
  (line,) = metrics.read_metrics(tmp_path, kind='train')
  assert 0 <= line['kl'] < 0.1
  assert line['rollout_gap'] < 0.1


def test_a_failing_reward_function_stops_the_run(
  whole_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = dataclasses.replace(
    _begin(whole_run),
    reward=rewards.RewardConfig(f'{_FUNCTIONS}:nothing', num_workers=1),
  )
  with pytest.raises(rewards.RewardError, match='nothing'):
    train.train(config, workdir=tmp_path)


def test_a_failing_reward_function_costs_its_groups_only(
  whole_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = dataclasses.replace(
    _begin(whole_run),
    reward=rewards.RewardConfig(
      f'{_FUNCTIONS}:nothing', num_workers=1, on_failure='drop'
    ),
    loop=small_run.loop_config(1),
  )
  outcome = train.train(config, workdir=tmp_path)
  (line,) = metrics.read_metrics(tmp_path, kind='train')
  assert line['failed'] == 1
  assert int(outcome.state.num_updates) == 1


def _same_answers(
  whole_run: pathlib.Path, workdir: pathlib.Path
) -> list[dict[str, Any]]:
  """Metrics of a run, whose answers must be those of the whole run."""
  found = metrics.read_metrics(workdir, kind='train')
  expected = metrics.read_metrics(whole_run, kind='train')[: len(found)]
  for name in ('reward', 'rollout_tokens', 'length_max'):
    assert [x[name] for x in found] == [x[name] for x in expected]
  return found


def test_a_drafter_that_diverges_is_switched_off_for_good(
  whole_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = _begin(whole_run)
  wild = dataclasses.replace(
    config.drafter,
    optimizer=optimizer.OptimizerConfig(learning_rate=1e38, warmup_steps=0),
  )
  config = dataclasses.replace(config, drafter=wild)
  short = dataclasses.replace(config, loop=small_run.loop_config(1, every=1))
  train.train(short, workdir=tmp_path)
  train.train(config, workdir=tmp_path)
  lines = _same_answers(whole_run, tmp_path)
  assert [line['drafter_off'] for line in lines] == [1, 1, 1]
  # The first rollout was before.
  assert [line['speculative_rounds'] > 0 for line in lines] == [
    True,
    False,
    False,
  ]


def test_a_spoilt_first_drafter_is_never_used(
  whole_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  saved = drafter_training.load(whole_run / 'first_drafter')
  saver = checkpoint.Checkpointer(
    tmp_path / 'spoilt' / 'checkpoints', checkpoint.CheckpointConfig()
  )
  spoilt = jax.tree.map(lambda x: np.full_like(x, np.nan), saved.params)
  saver.save(1, {'params': spoilt}, data_state=None, metadata=saved.meta)
  saver.close()
  config = dataclasses.replace(
    _begin(whole_run),
    first_drafter=str(tmp_path / 'spoilt'),
    loop=small_run.loop_config(1),
  )
  workdir = tmp_path / 'run'
  train.train(config, workdir=workdir)
  (line,) = _same_answers(whole_run, workdir)
  assert line['drafter_off'] == 1
  assert line['speculative_rounds'] == 0
  assert json.loads((workdir / 'result.json').read_text())['drafter_off']
  # None is left for others to take.
  assert not (workdir / 'drafter').exists()


def test_a_drafter_of_another_model_is_refused(
  whole_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = dataclasses.replace(
    _begin(whole_run), first_drafter=str(whole_run / 'drafter')
  )
  with pytest.raises(ValueError, match=r'first_drafter=.* another checkpoint'):
    start_lib.prepare(config, tmp_path)


def test_a_run_goes_on_from_policy_and_drafter_of_another(
  whole_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = small_run.config(
    checkpoint=str(whole_run), first_drafter=str(whole_run / 'drafter')
  )
  begun = start_lib.prepare(config, tmp_path)
  assert isinstance(begun, start_lib.Start)
  assert begun.target.step == 3
  saved = drafter_training.load(whole_run / 'drafter').params
  jax.tree.map(np.testing.assert_array_equal, begun.drafter_params, saved)


def _exported(whole_run: pathlib.Path, folder: pathlib.Path) -> str:
  """The model of a run as a folder of transformers."""
  run = trained_run.find(whole_run / 'supervised', name='run')
  interchange.export_run(run, folder)
  return f'hf:{folder}'


def test_a_run_begins_with_a_folder_of_transformers(
  whole_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = small_run.config(
    checkpoint=_exported(whole_run, tmp_path / 'theirs'),
    loop=small_run.loop_config(1, every=1),
  )
  rollout = dataclasses.replace(config.rollout, speculation='off')
  config = dataclasses.replace(config, rollout=rollout)
  assert train.train(config, workdir=tmp_path / 'run').stopped_by is None
  interchange.export_run(target_run.find(tmp_path / 'run'), tmp_path / 'ours')
  policy = trained_run.find(f'hf:{tmp_path / "ours"}', name='policy')
  assert policy.has_tokenizer
  jax.tree.map(
    np.testing.assert_array_equal,
    policy.restore_params(None),
    target_run.find(tmp_path / 'run').restore_params(None),
  )


def _with_rounds(config: TltConfig, num_steps: int) -> TltConfig:
  """Several rounds, of which some have groups with different rewards."""
  return dataclasses.replace(
    config,
    reward=rewards.RewardConfig(f'{_FUNCTIONS}:is_even', num_workers=1),
    rollout=dataclasses.replace(config.rollout, max_rounds=3),
    update=dataclasses.replace(
      config.update, drop_uninformative=True, optimizer=_CONSTANT
    ),
    loop=small_run.loop_config(num_steps, every=1),
  )


@pytest.mark.slow
def test_a_stopped_run_goes_on_behind_the_last_round(
  whole_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = _begin(whole_run)
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  train.train(_with_rounds(config, 3), workdir=whole)
  train.train(_with_rounds(config, 2), workdir=stopped)
  train.train(_with_rounds(config, 3), workdir=stopped)
  expected = metrics.read_metrics(whole, kind='train')
  found = metrics.read_metrics(stopped, kind='train')
  assert max(line['answer_rounds'] for line in expected[:2]) > 1
  for name in (
    'answer_rounds',
    'problems_answered',
    'problems_informative',
    'problems_used',
    'rollout_tokens',
    'reward',
    'used',
  ):
    assert [x[name] for x in found] == [x[name] for x in expected]
  for line in expected:
    assert line['problems_used'] <= 2
    # Two answers to each problem, of which those of used ones are trained on.
    assert line['used'] * line['problems_answered'] == line['problems_used']


def _partial(
  config: TltConfig, num_steps: int, unfinished: Any = 'continue'
) -> TltConfig:
  """Half of the problems in flight end a step; the rest goes on or waits."""
  return dataclasses.replace(
    config,
    rollout=dataclasses.replace(
      config.rollout,
      speculation='off',
      finish_share=0.5,
      unfinished=unfinished,
      rounds_at_once=2,
    ),
    reward=rewards.RewardConfig(f'{_FUNCTIONS}:is_even', num_workers=1),
    update=dataclasses.replace(config.update, optimizer=_CONSTANT),
    loop=small_run.loop_config(num_steps, every=1),
  )


@pytest.mark.slow
def test_unfinished_answers_go_on_where_a_stopped_run_left_them(
  whole_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = _begin(whole_run)
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  outcome = train.train(_partial(config, 4), workdir=whole)
  train.train(_partial(config, 2), workdir=stopped)
  resumed = train.train(_partial(config, 4), workdir=stopped)
  expected = metrics.read_metrics(whole, kind='train')
  found = metrics.read_metrics(stopped, kind='train')
  assert expected[1]['kept_tokens'] > 0
  for name in (
    'rollout_tokens',
    'kept_answers',
    'kept_tokens',
    'policy_staleness_mean',
    'length_mean',
    'problems_used',
  ):
    assert [x[name] for x in found] == [x[name] for x in expected]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    jax.device_get(resumed.state.params),
    jax.device_get(outcome.state.params),
  )
  # Every step trains on as many problems, however old their tokens are.
  assert [x['problems_answered'] for x in expected] == [2] * 4
  assert expected[0]['policy_staleness_max'] == 0
  assert expected[0]['ratio'] == 1
  stale = [x for x in expected if x['policy_staleness_max'] > 0]
  assert stale
  for line in stale:
    assert line['ratio'] != 1


@pytest.mark.slow
def test_deferred_problems_are_answered_by_one_policy(
  whole_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = _begin(whole_run)
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  train.train(_partial(config, 4, 'wait'), workdir=whole)
  train.train(_partial(config, 2, 'wait'), workdir=stopped)
  train.train(_partial(config, 4, 'wait'), workdir=stopped)
  expected = metrics.read_metrics(whole, kind='train')
  found = metrics.read_metrics(stopped, kind='train')
  for name in ('rollout_tokens', 'deferred_problems', 'length_mean'):
    assert [x[name] for x in found] == [x[name] for x in expected]
  waiting = [x['deferred_problems'] for x in expected]
  # Two of four are left until two wait, which a step then answers alone.
  assert waiting == [2, 0, 2, 0]
  for line in expected:
    assert line['problems_answered'] == 2
    assert line['policy_staleness_max'] == line['kept_tokens'] == 0


def test_rounds_for_informative_groups_leave_the_others_out() -> None:
  config = small_run.config()
  with pytest.raises(ValueError, match='drop_uninformative=True'):
    dataclasses.replace(
      config, rollout=dataclasses.replace(config.rollout, max_rounds=2)
    ).validate()


def test_a_warm_up_longer_than_the_run_is_refused_before_any_stage() -> None:
  config = small_run.config()
  slow = dataclasses.replace(config.update.optimizer, warmup_steps=3)
  with pytest.raises(ValueError, match='must be below num_steps=3'):
    dataclasses.replace(
      config, update=dataclasses.replace(config.update, optimizer=slow)
    ).validate()


def test_a_row_must_hold_the_longest_answer() -> None:
  config = small_run.config()
  with pytest.raises(ValueError, match='raise it to 32'):
    dataclasses.replace(
      config, update=dataclasses.replace(config.update, sequence_length=31)
    ).validate()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_answers(
  whole_run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Killed at any moment of a step: rollout, drafter's training or update."""
  folders = [str(whole_run / 'supervised'), str(whole_run / 'first_drafter')]

  def start(workdir: pathlib.Path) -> subprocess.Popen[bytes]:
    program = [sys.executable, '-m', 'tests.tlt.small_run', str(workdir)]
    return subprocess.Popen([*program, *folders])

  def steps(workdir: pathlib.Path) -> int:
    path = workdir / 'metrics.jsonl'
    return path.read_text().count('"kind"') if path.is_file() else 0

  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  assert start(whole).wait() == 0
  waits = iter((0.0, 0.05, 0.2))
  for wait in waits:
    process = start(killed)
    before = steps(killed)
    while steps(killed) == before and process.poll() is None:
      time.sleep(0.01)
    time.sleep(wait)
    process.kill()
    process.wait()
  assert start(killed).wait() == 0
  expected = metrics.read_metrics(whole, kind='train')
  found = metrics.read_metrics(killed, kind='train')
  assert [x['step'] for x in found] == [1, 2, 3, 4, 5, 6]
  for name in ('reward', 'rollout_tokens', 'length_max', 'loss'):
    np.testing.assert_allclose(
      [x[name] for x in found], [x[name] for x in expected], atol=1e-5
    )


def test_prompts_that_do_not_fit_are_refused_before_a_model_is_made(
  tmp_path: pathlib.Path,
) -> None:
  with pytest.raises(ValueError, match=r'must hold every prompt, one has \d+'):
    train.train(small_run.config(max_prompt_tokens=4), workdir=tmp_path)
  assert not (tmp_path / 'supervised' / 'checkpoints').exists()
