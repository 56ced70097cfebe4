"""Trains a language model on islands that hardly talk (DiLoCo).

./run.sh python -m experiments.diloco --workdir=out/islands \
  --config.islands=8 --config.sync_period=500
"""

import pathlib

from efficient_llm.diloco import train
from efficient_llm.diloco.config import DilocoConfig
from experiments import ending, runner


def run(config: DilocoConfig, workdir: pathlib.Path) -> int:
  """Trains and says where to look."""
  return ending.tell(train.train(config, workdir=workdir), workdir)


if __name__ == '__main__':
  runner.main(
    run,
    default_config='experiments/configs/diloco_cpu.py',
    config_type=DilocoConfig,
    workdir='out/diloco',
  )
