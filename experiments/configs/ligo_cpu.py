"""The byte-level model of 1 M parameters grown to twice its layers.

Paper:    Wang et al. 2023, LiGO, arXiv:2303.00980
Command:  ./run.sh python -m experiments.pretrain
          ./run.sh python -m experiments.ligo \
              --config.small=out/pretrain --workdir=out/ligo
          the small model first; --config.method=… for another method,
          --config=experiments/configs/ligo_cpu.py:mslt for a schedule of
          several models
Hardware: two CPU cores
"""

import dataclasses

from efficient_llm import optimizer
from efficient_llm.data import pipeline
from efficient_llm.ligo.config import (
  InheritConfig,
  LigoConfig,
  StageConfig,
)
from efficient_llm.models import presets
from efficient_llm.training import checkpoint, loop


def get_config(name: str = 'double') -> LigoConfig:
  """Ten layers out of five, on the text that the small model learned from.

  Args:
    name: 'double' at once; 'mslt' trains the upper half alone first;
      'progressive' has a model of eight layers between; 'llama_pro' trains only
      the layers that are new, between the old ones; 'bert2bert' first trains
      sub-models of five and ten layers; 'inherit' trains a new model that the
      small one teaches.
  """
  config = _double()
  changed = {
    'double': config,
    'mslt': dataclasses.replace(
      config, stages=(StageConfig(150, method='top', rest_old=True),)
    ),
    'progressive': dataclasses.replace(
      config, method='interpolate', stages=(StageConfig(150, num_layers=8),)
    ),
    'llama_pro': dataclasses.replace(config, method='identity', rest_old=True),
    'bert2bert': dataclasses.replace(
      config,
      method='aki',
      stages=(StageConfig(150, sub_model_layers=5),),
    ),
    'inherit': dataclasses.replace(
      config, method='random', inherit=InheritConfig(weight=1.0)
    ),
  }
  if name not in changed:
    raise ValueError(f'{name!r} must be one of {", ".join(changed)}.')
  return changed[name]


def _double() -> LigoConfig:
  small = presets.get('ladder_1m')
  return LigoConfig(
    small='out/pretrain',
    method='stack',
    model=dataclasses.replace(small, num_layers=10, scan_unroll=10),
    data=pipeline.DataConfig(sequence_length=128, batch_size=16),
    optimizer=optimizer.OptimizerConfig(
      learning_rate=4e-3, warmup_steps=50, schedule='wsd', decay_fraction=0.3
    ),
    loop=loop.LoopConfig(
      num_steps=400,
      eval_every=50,
      eval_batches=32,
      checkpoint=checkpoint.CheckpointConfig(every_steps=100),
    ),
  )
