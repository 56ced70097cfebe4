"""The main job in small, also as a program to be killed.

python -m tests.end_to_end.tiny_line WORKDIR
"""

import dataclasses
import sys

from efficient_llm import optimizer
from efficient_llm.data import config as data_config
from efficient_llm.end_to_end import line
from efficient_llm.end_to_end.config import (
  EndToEndConfig,
  GrowthConfig,
  IslandsConfig,
  Rung,
)
from efficient_llm.models import presets
from efficient_llm.training import loop, pretrain
from tests.tlt import small_run

_OPTIMIZER = optimizer.OptimizerConfig(learning_rate=3e-3, warmup_steps=0)


def config(text: str = 'stdlib') -> EndToEndConfig:
  model = presets.get('test', num_layers=3, max_positions=96)
  # A prompt has 20 bytes.
  made = small_run.config(loop=small_run.loop_config(2, every=1))
  reasoning = dataclasses.replace(
    made,
    max_prompt_tokens=24,
    update=dataclasses.replace(made.update, sequence_length=40),
  )
  return EndToEndConfig(
    target=pretrain.PretrainConfig(
      model=model,
      data=data_config.DataConfig(path=text, sequence_length=32, batch_size=4),
      optimizer=_OPTIMIZER,
      loop=loop.LoopConfig(
        num_steps=8,
        log_every=2,
        eval_every=2,
        eval_batches=2,
        tensorboard=False,
      ),
    ),
    ladder=(Rung(num_layers=1), Rung(num_layers=2)),
    growth=GrowthConfig(num_steps=4),
    islands=IslandsConfig(num_steps=4, islands=2, sync_period=2),
    reasoning=reasoning,
  )


if __name__ == '__main__':
  line.run(config(), workdir=sys.argv[1])
