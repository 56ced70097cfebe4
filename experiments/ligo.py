"""Grows a trained model into a larger one and trains it on (LiGO).

./run.sh python -m experiments.ligo --config.small=out/pretrain \
  --workdir=out/ligo
"""

import pathlib

from efficient_llm.ligo import train
from efficient_llm.ligo.config import LigoConfig
from experiments import ending, runner


def run(config: LigoConfig, workdir: pathlib.Path) -> int:
  """Grows, trains and says where to look."""
  return ending.tell(train.train(config, workdir=workdir), workdir)


if __name__ == '__main__':
  runner.main(
    run,
    default_config='experiments/configs/ligo_cpu.py',
    config_type=LigoConfig,
    workdir='out/ligo',
  )
