"""A whole run in small: stages, steps, resuming, what is left at the end."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm import optimizer
from efficient_llm.data import config as data_config
from efficient_llm.data.tasks import task
from efficient_llm.models import presets, sampling
from efficient_llm.speculative import (
  drafter_loss,
  drafter_program,
  drafter_training,
  strategy,
  target_run,
)
from efficient_llm.tlt import (
  policy_loss,
  rewards,
  rollout,
  spot_trainer,
  train,
  update,
)
from efficient_llm.tlt.config import TltConfig
from efficient_llm.training import checkpoint, loop, metrics, pretrain

pytestmark = pytest.mark.usefixtures('compilation_cache')

_OPTIMIZER = optimizer.OptimizerConfig(learning_rate=3e-3, warmup_steps=0)
_FUNCTIONS = 'tests.tlt.reward_functions'


def _loop(num_steps: int, every: int = 100) -> loop.LoopConfig:
  return loop.LoopConfig(
    num_steps=num_steps,
    log_every=1,
    eval_every=None,
    eval_batches=1,
    tensorboard=False,
    checkpoint=checkpoint.CheckpointConfig(every_steps=every),
  )


def _config(**changes: Any) -> TltConfig:
  config = TltConfig(
    task=task.TaskConfig(name='trace', max_steps=1),
    supervised=pretrain.PretrainConfig(
      model=presets.get('test', max_positions=64),
      data=data_config.DataConfig(sequence_length=48, batch_size=4),
      optimizer=_OPTIMIZER,
      loop=_loop(4),
    ),
    num_examples=200,
    warmup=drafter_program.DrafterConfig(
      optimizer=_OPTIMIZER,
      loss=drafter_loss.DrafterLossConfig(num_passes=1),
      loop=_loop(2),
    ),
    rollout=rollout.RolloutConfig(
      num_prompts=2,
      group_size=2,
      max_live=2,
      num_texts=2,
      sampling=sampling.SamplingConfig(16),
      strategy=strategy.StrategyConfig(arms=('3_1_4',), thresholds=(1,)),
    ),
    reward=rewards.RewardConfig(num_workers=1),
    update=update.UpdateConfig(
      sequence_length=32,
      rows_at_once=2,
      optimizer=_OPTIMIZER,
      drop_uninformative=False,
    ),
    drafter=spot_trainer.SpotConfig(
      mode='separate',
      batch_size=1,
      separate_steps=1,
      loss=drafter_loss.DrafterLossConfig(num_passes=1),
    ),
    loop=_loop(3, every=1),
    max_prompt_tokens=16,
    eval_problems=2,
  )
  return dataclasses.replace(config, **changes)


@pytest.fixture(scope='module')
def whole_run(
  tmp_path_factory: pytest.TempPathFactory, compilation_cache: None
) -> pathlib.Path:
  """A run of three steps from nothing."""
  del compilation_cache
  workdir = tmp_path_factory.mktemp('tlt')
  assert train.train(_config(), workdir=workdir).stopped_by is None
  return workdir


def _begin(whole_run: pathlib.Path) -> TltConfig:
  """Of a run that takes model and drafter from another."""
  return _config(
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
  short = dataclasses.replace(config, loop=_loop(1, every=1))
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


@pytest.mark.parametrize(
  'algorithm', ['dr_grpo', pytest.param('gspo', marks=pytest.mark.slow)]
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
    dataclasses.replace(config, update=settings, loop=_loop(1)),
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
    loop=_loop(1),
  )
  outcome = train.train(config, workdir=tmp_path)
  (line,) = metrics.read_metrics(tmp_path, kind='train')
  assert line['failed'] == 1
  assert int(outcome.state.num_updates) == 1


def test_a_row_must_hold_the_longest_answer() -> None:
  config = _config()
  with pytest.raises(ValueError, match='raise it to 32'):
    dataclasses.replace(
      config, update=dataclasses.replace(config.update, sequence_length=31)
    ).validate()
