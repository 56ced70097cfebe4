"""Llama 3.1 8B, 1 M tokens a step, on one v5e slice of 256 chips.

Paper:    The Llama 3 Herd of Models, arXiv:2407.21783, table 3 (8B)
Command:  python -m experiments.pretrain \
            --config=experiments/configs/pretrain_8b.py --workdir=DIR \
            --config.data.path=TEXT --config.data.tokenizer=TOKENIZER
Plan:     python -m experiments.plan \
            --config=experiments/configs/pretrain_8b.py --topology=v5e:16x16
Hardware: v5e:16x16 (256 chips)
Time:     planned, not run: 2.1 s a step, 3.6 days for all 150,000
Expected: planned, not run: 5.9 of 15.75 GiB a chip, 48 % MFU
"""

from efficient_llm import optimizer, sharding
from efficient_llm.data import pipeline
from efficient_llm.models import presets
from efficient_llm.training import checkpoint, loop, pretrain


def get_config() -> pretrain.PretrainConfig:
  """One row of 4,096 tokens per chip; about 20 tokens per parameter."""
  return pretrain.PretrainConfig(
    model=presets.get(
      'llama_8b', dtype='bfloat16', remat='full', max_positions=8192
    ),
    data=pipeline.DataConfig(sequence_length=4096, batch_size=256),
    optimizer=optimizer.OptimizerConfig(
      learning_rate=3e-4, warmup_steps=2000, schedule='cosine'
    ),
    loop=loop.LoopConfig(
      num_steps=150_000,
      log_every=10,
      eval_every=1000,
      checkpoint=checkpoint.CheckpointConfig(every_steps=1000),
    ),
    mesh=sharding.MeshConfig(fsdp=256),
  )
