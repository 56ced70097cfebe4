"""Runs of islands that stand in for trainings, to measure what is around them.

Command: see benchmarks.wan_utilisation and benchmarks.wan_stand_in.
"""

from efficient_llm.data import pipeline
from efficient_llm.diloco.compression import CompressionConfig
from efficient_llm.diloco.fragments import FragmentConfig
from efficient_llm.diloco.outer import OuterConfig
from efficient_llm.diloco.wan.config import IslandsConfig, RoundConfig
from efficient_llm.models import transformer
from efficient_llm.training import checkpoint, loop


def get_config(arm: str) -> IslandsConfig:
  """'blocking_int8': whole, waited for; 'streaming_int4': in four, overlapped.

  1.3 M parameters: small, as what programs take with them is not dilated.
  """
  if arm not in ('blocking_int8', 'streaming_int4'):
    raise ValueError(f'{arm!r} must be blocking_int8 or streaming_int4.')
  is_streaming = arm == 'streaming_int4'
  compression = CompressionConfig(format='int8', block_size=1024)
  fragments = FragmentConfig()
  if is_streaming:
    compression = CompressionConfig(format='int4')
    fragments = FragmentConfig(count=4, overlap_steps=5, mixing=0.5)
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
      ask_secs=0.2,
      match_speeds=False,
    ),
  )
