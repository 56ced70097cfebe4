"""Trains a drafter for the model of a pre-training run, on the same text.

./run.sh python -m experiments.drafter --target=out/pretrain \
  --workdir=out/drafter
"""

import dataclasses
import pathlib

from absl import flags

from efficient_llm.models.huggingface import hub
from efficient_llm.speculative import drafter_training
from efficient_llm.training import processes
from experiments import ending, runner

_TARGET = flags.DEFINE_string(
  'target', None, 'Folder of the run whose model the drafter drafts for.'
)


def run(config: drafter_training.DrafterConfig, workdir: pathlib.Path) -> int:
  """Trains and says where to look."""
  if _TARGET.value is not None:
    config = dataclasses.replace(config, target=hub.absolute(_TARGET.value))
    # Again, as a flag that is no field comes after the configuration.
    processes.on_first(lambda: runner.write_config(config, workdir))
  return ending.tell(drafter_training.train(config, workdir=workdir), workdir)


if __name__ == '__main__':
  runner.main(
    run,
    default_config='experiments/configs/drafter_cpu.py',
    config_type=drafter_training.DrafterConfig,
    workdir='out/drafter',
  )
