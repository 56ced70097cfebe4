"""The main job with a model of 324 M parameters, on one GPU or several.

Command:  ./run.sh python -m experiments.end_to_end --workdir=out/gpu \
              --config=experiments/configs/end_to_end_gpu.py --platform=gpu \
              --config.target.data.path=TEXT
Hardware: one H100 or H200 (80 GB), or several, to which islands are dealt out
Time:     not measured; experiments.plan estimates 4 h 14 min on one H100
          without reinforcement learning
Expected: not measured; every train step was compiled and fits
"""

import dataclasses

from efficient_llm import optimizer, sharding
from efficient_llm.data import pipeline
from efficient_llm.diloco import compression, fragments, outer
from efficient_llm.end_to_end.config import (
  EndToEndConfig,
  GrowthConfig,
  IslandsConfig,
  Rung,
)
from efficient_llm.ligo.config import LearnConfig, ProbeConfig
from efficient_llm.training import checkpoint, loop, pretrain
from experiments.configs import tlt_gpu

_MESH = sharding.MeshConfig(data=-1, fsdp=1)
_VOCABULARY = 16_384


def get_config() -> EndToEndConfig:
  """1.3 billion tokens; the model of `tlt_gpu`, with a larger vocabulary."""
  reasoning = tlt_gpu.get_config()
  model = dataclasses.replace(
    reasoning.supervised.model, vocab_size=_VOCABULARY
  )
  return EndToEndConfig(
    target=pretrain.PretrainConfig(
      model=model,
      mesh=_MESH,
      data=pipeline.DataConfig(
        tokenizer=f'bpe:{_VOCABULARY}', sequence_length=1024, batch_size=64
      ),
      optimizer=adamw(6e-4, warmup_steps=500),
      loop=loop.LoopConfig(
        num_steps=20_000,
        eval_every=500,
        eval_batches=64,
        checkpoint=checkpoint.CheckpointConfig(every_steps=500),
      ),
    ),
    ladder=tuple(Rung(num_layers=n) for n in (3, 6, 13)),
    growth=GrowthConfig(
      num_steps=10_000,
      method='auto',
      # Of a quarter of the batch, which is nearly as good and costs that much.
      learn=LearnConfig(num_steps=100, batch_size=16),
      probe=ProbeConfig(num_steps=200),
      optimizer=adamw(6e-4, warmup_steps=200),
    ),
    islands=IslandsConfig(
      num_steps=4000,
      islands=4,
      sync_period=100,
      optimizer=adamw(4e-4, warmup_steps=200),
      outer=outer.OuterConfig(learning_rate=0.4),
      fragments=fragments.FragmentConfig(count=4, overlap_steps=5, mixing=0.5),
      compression=compression.CompressionConfig('int4'),
    ),
    reasoning=reasoning,
  )


def adamw(rate: float, *, warmup_steps: int) -> optimizer.OptimizerConfig:
  """With the schedule of the whole line."""
  return optimizer.OptimizerConfig(
    learning_rate=rate,
    warmup_steps=warmup_steps,
    schedule='wsd',
    decay_fraction=0.2,
  )
