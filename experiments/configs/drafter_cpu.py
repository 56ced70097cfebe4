"""A one-layer drafter for a target of 1 M to 5 M parameters, on a CPU.

Paper:    EAGLE, arXiv:2401.15077; unrolled as in EAGLE-3, arXiv:2503.01840
Command:  ./run.sh python -m experiments.drafter --target=out/pretrain
Hardware: two CPU cores
Time:     three minutes for 1 M with half of the cores taken; 5 M is 4 x slower
Expected: acceptance above 0.9 at each depth, for a target of 1 M trained for
          250 steps on film reviews
"""

from efficient_llm import optimizer
from efficient_llm.speculative import drafter_training
from efficient_llm.training import checkpoint, loop


def get_config() -> drafter_training.DrafterConfig:
  """The drafter of the model of pretrain_cpu.py."""
  return drafter_training.DrafterConfig(
    loss=drafter_training.DrafterLossConfig(num_passes=3),
    optimizer=optimizer.OptimizerConfig(
      learning_rate=8e-3, warmup_steps=30, schedule='wsd', decay_fraction=0.3
    ),
    loop=loop.LoopConfig(
      num_steps=400,
      eval_every=100,
      eval_batches=16,
      checkpoint=checkpoint.CheckpointConfig(every_steps=100),
    ),
  )
