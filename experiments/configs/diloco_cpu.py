"""Four islands on one machine, a byte-level model of 0.2 M parameters.

Paper:    Douillard et al. 2023, DiLoCo, arXiv:2311.08105; variants by name
Command:  ./run.sh python -m experiments.diloco --workdir=out/diloco \
              --config=experiments/configs/diloco_cpu.py:streaming
Hardware: two CPU cores
Time:     two to six minutes, beside other jobs
Expected: validation loss in nats a byte, one seed, 819,046 tokens in all:
          data_parallel 2.01, streaming 2.45, local_sgd 2.49, diloco 2.57,
          eager 2.89, one island alone (a quarter of the tokens) 2.72. From
          scratch, so small and so short, islands lose much to data-parallel
"""

import dataclasses

from efficient_llm import optimizer
from efficient_llm.data import pipeline
from efficient_llm.diloco import variants
from efficient_llm.diloco.config import DilocoConfig
from efficient_llm.models import presets
from efficient_llm.training import checkpoint, loop


def get_config(variant: str = 'diloco') -> DilocoConfig:
  """A run of any variant in `variants.NAMES`."""
  config = DilocoConfig(
    model=presets.get('ladder_200k'),
    data=pipeline.DataConfig(sequence_length=128, batch_size=4),
    optimizer=optimizer.OptimizerConfig(
      learning_rate=6e-3, b2=0.99, warmup_steps=20, schedule='wsd'
    ),
    loop=loop.LoopConfig(
      num_steps=400,
      eval_every=100,
      eval_batches=32,
      checkpoint=checkpoint.CheckpointConfig(every_steps=100),
    ),
    islands=4,
    sync_period=20,
  )
  config = variants.apply(variant, config)
  if config.outer.optimizer == 'nesterov':
    # With so few rounds a momentum of 0.9 has no time to settle.
    outer = dataclasses.replace(config.outer, momentum=0.5)
    config = dataclasses.replace(config, outer=outer)
  return config
