"""Reinforcement learning whose long tail is decoded speculatively (TLT).

./run.sh python -m experiments.tlt --workdir=out/tlt

Without --checkpoint a model is made first, from worked examples of the task.
At the end the folder holds the policy and, in drafter/, its drafter:

./run.sh python -m experiments.generate --checkpoint=out/tlt \
  --drafter=out/tlt/drafter --prompts=prompts.txt
"""

import dataclasses
import pathlib
import sys
from typing import cast, get_args

from absl import flags

from efficient_llm.data.tasks import task as task_lib
from efficient_llm.models.huggingface import hub
from efficient_llm.tlt import compare, finish, rewards, train
from efficient_llm.tlt.config import TltConfig
from efficient_llm.training import loop
from experiments import cpu_workers, runner

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'Folder of the run whose model is gone on from.'
)
_TASK = flags.DEFINE_enum(
  'task',
  None,
  get_args(task_lib.Name),
  'Another task than the file has, with its own defaults.',
)
_AB = flags.DEFINE_integer(
  'ab', None, 'Only answer so many steps with and without TLT, and compare.'
)


def run(config: TltConfig, workdir: pathlib.Path) -> int:
  """Trains and says where to look."""
  if _AB.value is not None:
    return _compare(config, workdir)
  try:
    outcome = train.train(config, workdir=workdir)
  except rewards.RewardError as error:
    print(f'error: {error}', file=sys.stderr)
    return runner.FAILED
  if outcome.stopped_by is not None:
    runner.say(f'Stopped by {outcome.stopped_by}; the same command continues.')
    return runner.STOPPED
  if finish.drafter_is_off(workdir):
    runner.say(
      'The drafter was switched off, as it was not finite; the answers are '
      'those of plain decoding.'
    )
  runner.say(f'Report: {workdir / "report.html"}')
  return runner.DONE


def _compare(config: TltConfig, workdir: pathlib.Path) -> int:
  result = compare.compare(config, workdir=workdir, num_steps=_AB.value or 0)
  if isinstance(result, loop.Outcome):
    runner.say(f'Stopped by {result.stopped_by}; the same command continues.')
    return runner.STOPPED
  runner.say(
    f'Rollouts {result["speedup_rollout"]:.2f} times as fast with TLT, '
    f'{result["acceptance_length"]:.2f} tokens a target pass.'
  )
  return runner.DONE


def with_flags(config: TltConfig) -> TltConfig:
  """The configuration with what the flags say.

  The settings of a task belong to it alone, so another one brings its own.
  """
  if _CHECKPOINT.value is not None:
    folder = hub.absolute(_CHECKPOINT.value)
    config = dataclasses.replace(config, checkpoint=folder)
  name = _TASK.value
  if name is not None and name != config.task.name:
    config = dataclasses.replace(
      config, task=task_lib.TaskConfig(cast(task_lib.Name, name))
    )
  return config


if __name__ == '__main__':
  runner.main(
    run,
    default_config='experiments/configs/tlt_cpu.py',
    config_type=TltConfig,
    workdir='out/tlt',
    before_jax=cpu_workers.start,
    adapt=with_flags,
  )
