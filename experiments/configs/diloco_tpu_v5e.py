"""Llama 3.2 1B on four islands, each a v5e slice of 16 chips.

Paper:    Douillard et al. 2025, Streaming DiLoCo, arXiv:2501.18512
Command:  python -m experiments.diloco \
            --config=experiments/configs/diloco_tpu_v5e.py --workdir=DIR \
            --config.data.path=TEXT --config.data.tokenizer=TOKENIZER
Hardware: v5e:4x4, four slices (64 chips)
Time:     compiled, not run
Expected: compiled, not run: an inner step takes 4.1 of a chip's 15.75 GiB, a
          sync 3.6; an island sends 657 MB in 100 steps
"""

import dataclasses

from efficient_llm import optimizer, sharding
from efficient_llm.data import pipeline
from efficient_llm.diloco import variants
from efficient_llm.diloco.config import DilocoConfig
from efficient_llm.diloco.fragments import FragmentConfig
from efficient_llm.models import presets
from efficient_llm.training import checkpoint, loop


def get_config() -> DilocoConfig:
  """Half a million tokens a step, a quarter of them on each island."""
  config = DilocoConfig(
    model=presets.get(
      'llama_1b', dtype='bfloat16', remat='full', max_positions=2048
    ),
    data=pipeline.DataConfig(sequence_length=2048, batch_size=64),
    optimizer=optimizer.OptimizerConfig(
      learning_rate=4e-4, b2=0.99, warmup_steps=1000, schedule='cosine'
    ),
    loop=loop.LoopConfig(
      num_steps=50_000,
      eval_every=1000,
      checkpoint=checkpoint.CheckpointConfig(every_steps=1000),
    ),
    mesh=sharding.MeshConfig(island=4, fsdp=16),
    islands=4,
    sync_period=100,
  )
  config = variants.apply('streaming', config)
  # Three layers to a fragment, as published, where they divide the layers.
  fragments = FragmentConfig(count=4, overlap_steps=5, mixing=0.5)
  return dataclasses.replace(config, fragments=fragments)
