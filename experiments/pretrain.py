"""Trains a language model on text.

./run.sh python -m experiments.pretrain --workdir=out/mine \
  --config.data.path=my_texts/
"""

import pathlib

from efficient_llm.training import pretrain
from experiments import runner


def run(config: pretrain.PretrainConfig, workdir: pathlib.Path) -> int:
  """Trains and says where to look."""
  outcome = pretrain.train(config, workdir=workdir)
  if outcome.stopped_by is not None:
    runner.say(f'Stopped by {outcome.stopped_by}; the same command continues.')
    return runner.STOPPED
  runner.say(f'Report: {workdir / "report.html"}')
  return runner.DONE


if __name__ == '__main__':
  runner.main(
    run,
    default_config='experiments/configs/pretrain_cpu.py',
    config_type=pretrain.PretrainConfig,
    workdir='out/pretrain',
  )
