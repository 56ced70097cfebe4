"""The main job with a model of 324 M parameters, on 16 TPU v5e chips.

Command:  python -m experiments.end_to_end --workdir=DIR --platform=tpu \
              --config=experiments/configs/end_to_end_tpu_v5e.py \
              --config.target.data.path=TEXT --distributed
Hardware: v5e:4x4; islands of four chips each
Time:     not measured; experiments.plan estimates 1 h 21 min without
          reinforcement learning
Expected: not measured; every train step was compiled and fits
"""

import dataclasses

from efficient_llm import sharding
from efficient_llm.end_to_end.config import EndToEndConfig
from experiments.configs import end_to_end_gpu


def get_config() -> EndToEndConfig:
  """As on a GPU, over 16 chips; every chip answers problems of its own."""
  config = end_to_end_gpu.get_config()
  reasoning = config.reasoning
  return dataclasses.replace(
    config,
    target=dataclasses.replace(
      config.target, mesh=sharding.MeshConfig(data=1, fsdp=16)
    ),
    islands=dataclasses.replace(
      config.islands, mesh=sharding.MeshConfig(island=4, fsdp=4)
    ),
    reasoning=dataclasses.replace(
      reasoning,
      rollout=dataclasses.replace(
        reasoning.rollout, num_prompts=32, max_live=16
      ),
      drafter=dataclasses.replace(reasoning.drafter, mode='adaptive'),
      supervised=dataclasses.replace(
        reasoning.supervised, mesh=sharding.MeshConfig(data=1, fsdp=16)
      ),
      update=dataclasses.replace(reasoning.update, rows_at_once=16),
    ),
  )
