"""Fine-tuning on labels as the LiGO paper does on GLUE.

Paper:    Wang et al. 2023, LiGO, arXiv:2303.00980, section 4: three passes in
          batches of 32 at a rate of 1e-4
Command:  ./run.sh python -m experiments.classify --config.start=out/ligo \
              --config.data.path=labels.csv --workdir=out/classified
          --config.data.second_text_key=… for pairs of texts; --config.seed=…
          with a workdir of its own for each of several seeds
Hardware: as for training the model
"""

from efficient_llm import optimizer
from efficient_llm.training import checkpoint, classifier, loop


def get_config() -> classifier.ClassifyConfig:
  """A rate that falls to 0 from the first step on, as is usual on GLUE."""
  return classifier.ClassifyConfig(
    optimizer=optimizer.OptimizerConfig(
      learning_rate=1e-4,
      schedule='wsd',
      warmup_steps=0,
      decay_fraction=1.0,
      final_fraction=0.0,
      b2=0.999,
      weight_decay=0.01,
    ),
    loop=loop.LoopConfig(
      eval_batches=None,
      checkpoint=checkpoint.CheckpointConfig(every_steps=100),
    ),
  )
