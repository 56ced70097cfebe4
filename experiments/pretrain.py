"""Trains a language model on text.

./run.sh python -m experiments.pretrain --workdir=out/mine \
  --config.data.path=my_texts/
"""

import pathlib

from efficient_llm.training import pretrain
from experiments import ending, runner


def run(config: pretrain.PretrainConfig, workdir: pathlib.Path) -> int:
  """Trains and says where to look."""
  return ending.tell(pretrain.train(config, workdir=workdir), workdir)


if __name__ == '__main__':
  runner.main(
    run,
    default_config='experiments/configs/pretrain_cpu.py',
    config_type=pretrain.PretrainConfig,
    workdir='out/pretrain',
  )
