"""The CaiT on scikit-learn's digits, grown to half more width.

Paper:    Wang et al. 2023, LiGO, arXiv:2303.00980, whose CaiT-XS24 grows to
          S24 in width alone too
Command:  the small model first, as pretrain_vision_cpu.py says, then
          ./run.sh python -m experiments.pretrain --workdir=out/digits_scratch \
              --config=experiments/configs/ligo_vision_cpu.py:scratch
          ./run.sh python -m experiments.ligo --config.small=out/digits \
              --config=experiments/configs/ligo_vision_cpu.py \
              --config.scratch=out/digits_scratch --workdir=out/digits_ligo
Hardware: two CPU cores
Time:     five to ten minutes each, with many others on the cores
Expected: with one seed, 95.4 % of the classes right after 1000 steps, 90.6 %
          from scratch; scratch's last loss for 48 % fewer FLOPs, for 20 % more
          where the small model counts too
"""

import dataclasses

from efficient_llm.ligo.config import LearnConfig, LigoConfig
from efficient_llm.models import presets
from efficient_llm.training import pretrain
from experiments.configs import pretrain_vision_cpu


def get_config(name: str = 'grown') -> pretrain.PretrainConfig:
  """Six heads out of four, with the small model's data.

  Args:
    name: 'grown' out of the small model, or 'scratch' from nothing.
  """
  small = pretrain_vision_cpu.get_config()
  model = presets.get('cait_digits', embed_dim=96, num_heads=6)
  steps = dataclasses.replace(small.loop, num_steps=1000, eval_every=50)
  if name == 'scratch':
    return dataclasses.replace(small, model=model, loop=steps)
  if name != 'grown':
    raise ValueError(f'{name!r} must be grown or scratch.')
  return LigoConfig(
    small='out/digits',
    method='ligo_released',
    learn=LearnConfig(num_steps=100),
    model=model,
    data=small.data,
    optimizer=small.optimizer,
    loop=steps,
  )
