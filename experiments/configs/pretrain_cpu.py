"""A byte-level Llama-style model of 1 M parameters, in three minutes on a CPU.

Command:  ./run.sh python -m experiments.pretrain
Hardware: two CPU cores
Time:     a bit over three minutes after set-up
Expected: validation loss between 1.5 and 1.7 nats a byte
"""

from efficient_llm import optimizer
from efficient_llm.data import pipeline
from efficient_llm.models import presets, sampling
from efficient_llm.training import checkpoint, loop, pretrain


def get_config() -> pretrain.PretrainConfig:
  """Five layers, on the Python standard library's sources."""
  return pretrain.PretrainConfig(
    model=presets.get('ladder_1m'),
    data=pipeline.DataConfig(sequence_length=128, batch_size=16),
    optimizer=optimizer.OptimizerConfig(
      learning_rate=4e-3, warmup_steps=50, schedule='wsd', decay_fraction=0.3
    ),
    loop=loop.LoopConfig(
      num_steps=700,
      eval_every=100,
      eval_batches=32,
      checkpoint=checkpoint.CheckpointConfig(every_steps=100),
    ),
    sampling=sampling.SamplingConfig(
      max_new_tokens=200, temperature=0.7, top_p=0.95
    ),
    sample_prompts=('def main(', 'class ', 'import ', '    return '),
  )
