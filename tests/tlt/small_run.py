"""A run of reinforcement learning in small, also as a program to be killed.

python -m tests.tlt.small_run WORKDIR CHECKPOINT DRAFTER
"""

import dataclasses
import sys
from typing import Any

from efficient_llm import optimizer
from efficient_llm.data import config as data_config
from efficient_llm.data.tasks import task
from efficient_llm.models import presets, sampling
from efficient_llm.speculative import (
  drafter_loss,
  drafter_program,
  strategy_config,
)
from efficient_llm.tlt import (
  rewards,
  rollout_config,
  spot_config,
  train,
  update,
)
from efficient_llm.tlt.config import TltConfig
from efficient_llm.training import checkpoint, loop, pretrain

_OPTIMIZER = optimizer.OptimizerConfig(learning_rate=3e-3, warmup_steps=0)


def loop_config(num_steps: int, every: int = 100) -> loop.LoopConfig:
  return loop.LoopConfig(
    num_steps=num_steps,
    log_every=1,
    eval_every=None,
    eval_batches=1,
    tensorboard=False,
    checkpoint=checkpoint.CheckpointConfig(every_steps=every),
  )


def config(**changes: Any) -> TltConfig:
  made = TltConfig(
    task=task.TaskConfig(name='trace', max_steps=1),
    supervised=pretrain.PretrainConfig(
      model=presets.get('test', max_positions=64),
      data=data_config.DataConfig(sequence_length=48, batch_size=4),
      optimizer=_OPTIMIZER,
      loop=loop_config(4),
    ),
    num_examples=200,
    warmup=drafter_program.DrafterConfig(
      optimizer=_OPTIMIZER,
      loss=drafter_loss.DrafterLossConfig(num_passes=1),
      loop=loop_config(2),
    ),
    rollout=rollout_config.RolloutConfig(
      num_prompts=2,
      group_size=2,
      max_live=2,
      num_texts=2,
      sampling=sampling.SamplingConfig(16),
      strategy=strategy_config.StrategyConfig(arms=('3_1_4',), thresholds=(1,)),
    ),
    reward=rewards.RewardConfig(num_workers=1),
    update=update.UpdateConfig(
      sequence_length=32,
      rows_at_once=2,
      optimizer=_OPTIMIZER,
      drop_uninformative=False,
    ),
    drafter=spot_config.SpotConfig(
      mode='separate',
      batch_size=1,
      separate_steps=1,
      loss=drafter_loss.DrafterLossConfig(num_passes=1),
    ),
    loop=loop_config(3, every=1),
    max_prompt_tokens=16,
    eval_problems=2,
  )
  return dataclasses.replace(made, **changes)


if __name__ == '__main__':
  workdir, start, drafter = sys.argv[1:]
  train.train(
    config(
      checkpoint=start, first_drafter=drafter, loop=loop_config(6, every=1)
    ),
    workdir=workdir,
  )
