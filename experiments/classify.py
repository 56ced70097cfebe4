"""Fine-tunes a trained or grown model on texts with labels.

./run.sh python -m experiments.classify --config.start=out/ligo \
  --config.data.path=labels.csv --workdir=out/classified
"""

import pathlib

from efficient_llm.training import classification, classifier
from experiments import ending, runner


def run(config: classifier.ClassifyConfig, workdir: pathlib.Path) -> int:
  """Trains and says where to look."""
  return ending.tell(classification.train(config, workdir=workdir), workdir)


if __name__ == '__main__':
  runner.main(
    run,
    default_config='experiments/configs/classify.py',
    config_type=classifier.ClassifyConfig,
    workdir='out/classified',
  )
