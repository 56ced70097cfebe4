"""Runs of islands that stand in for trainings, to measure what is around them.

Command: see benchmarks.wan_utilisation and benchmarks.wan_stand_in.
"""

from efficient_llm import optimizer
from efficient_llm.data import pipeline
from efficient_llm.diloco.compression import CompressionConfig
from efficient_llm.diloco.fragments import FragmentConfig
from efficient_llm.diloco.outer import OuterConfig
from efficient_llm.diloco.screening import ScreeningConfig
from efficient_llm.diloco.wan.config import IslandsConfig, RoundConfig
from efficient_llm.models import presets, transformer
from efficient_llm.training import checkpoint, loop


def get_config(arm: str) -> IslandsConfig:
  """'blocking_int8': whole, waited for; 'streaming_int4': in four, overlapped.

  1.3 M parameters: small, as what programs take with them is not dilated.
  'chaos': 0.2 M parameters that are really trained, by six islands.
  """
  if arm == 'chaos':
    return _chaos()
  if arm not in ('blocking_int8', 'streaming_int4'):
    raise ValueError(f'{arm!r} must be blocking_int8, streaming_int4 or chaos.')
  is_streaming = arm == 'streaming_int4'
  compression = CompressionConfig(format='int8', block_size=1024)
  fragments = FragmentConfig()
  if is_streaming:
    compression = CompressionConfig(format='int4')
    fragments = FragmentConfig(count=4, overlap_steps=5)
  return IslandsConfig(
    model=transformer.TransformerConfig(
      vocab_size=256, num_layers=8, embed_dim=112, num_heads=4
    ),
    data=pipeline.DataConfig(sequence_length=128, batch_size=1),
    loop=loop.LoopConfig(
      checkpoint=checkpoint.CheckpointConfig(every_steps=1_000_000)
    ),
    islands=8,
    sync_period=100,
    outer=OuterConfig(learning_rate=0.7, momentum=0.5),
    fragments=fragments,
    compression=compression,
    down_compression=compression,
    rounds=RoundConfig(
      quorum=1.0,
      grace_secs=300.0,
      deadline_secs=300.0,
      patience_secs=300.0,
      poll_secs=300.0,
      # A question is bytes as well, and its time is not dilated: as seldom as
      # an overlap of 5.7 s allows.
      ask_secs=2.0 if is_streaming else 0.2,
      match_speeds=False,
    ),
  )


def _chaos() -> IslandsConfig:
  small = CompressionConfig(format='int4')
  return IslandsConfig(
    model=presets.get('ladder_200k'),
    data=pipeline.DataConfig(sequence_length=128, batch_size=2),
    optimizer=optimizer.OptimizerConfig(
      learning_rate=6e-3, b2=0.99, warmup_steps=20, schedule='wsd'
    ),
    loop=loop.LoopConfig(checkpoint=checkpoint.CheckpointConfig(every_steps=1)),
    islands=6,
    sync_period=40,
    outer=OuterConfig(learning_rate=0.7, momentum=0.5),
    fragments=FragmentConfig(count=2, overlap_steps=4),
    compression=small,
    down_compression=small,
    # The sign of an update shows only beside those of others.
    screening=ScreeningConfig(min_cosine=0.0),
    rounds=RoundConfig(
      grace_secs=3.0,
      deadline_secs=20.0,
      max_late_rounds=2,
      patience_secs=15.0,
      poll_secs=10.0,
      ask_secs=0.5,
      match_speeds=False,
    ),
  )
