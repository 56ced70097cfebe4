"""Islands on one machine, to learn it: a byte-level model of 0.2 M parameters.

Paper:    Douillard et al. 2025, Streaming DiLoCo, arXiv:2501.18512
Command:  ./run.sh python -m experiments.islands --local=4 --workdir=out/wan
Hardware: two CPU cores
Time:     not measured
Expected: not measured
"""

from efficient_llm import optimizer
from efficient_llm.data import pipeline
from efficient_llm.diloco.compression import CompressionConfig
from efficient_llm.diloco.fragments import FragmentConfig
from efficient_llm.diloco.outer import OuterConfig
from efficient_llm.diloco.wan.config import IslandsConfig, RoundConfig
from efficient_llm.models import presets
from efficient_llm.training import checkpoint, loop


def get_config(variant: str = 'streaming') -> IslandsConfig:
  """'streaming': two fragments as int4, an overlap; 'blocking': whole, int8."""
  if variant not in ('streaming', 'blocking'):
    raise ValueError(f'{variant!r} must be streaming or blocking.')
  is_streaming = variant == 'streaming'
  compression = CompressionConfig(format='int4' if is_streaming else 'int8')
  fragments = FragmentConfig()
  if is_streaming:
    fragments = FragmentConfig(count=2, overlap_steps=5)
  return IslandsConfig(
    model=presets.get('ladder_200k'),
    data=pipeline.DataConfig(sequence_length=128, batch_size=4),
    optimizer=optimizer.OptimizerConfig(
      learning_rate=6e-3, b2=0.99, warmup_steps=20, schedule='wsd'
    ),
    loop=loop.LoopConfig(
      num_steps=2000, checkpoint=checkpoint.CheckpointConfig(every_steps=1)
    ),
    islands=4,
    sync_period=200,
    outer=OuterConfig(learning_rate=0.7, momentum=0.5),
    fragments=fragments,
    compression=compression,
    down_compression=compression,
    rounds=RoundConfig(
      grace_secs=20.0, deadline_secs=120.0, patience_secs=60.0
    ),
  )
