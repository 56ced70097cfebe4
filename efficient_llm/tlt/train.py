"""READ FIRST. Reinforcement learning whose long tail is decoded speculatively.

A step: workers answer the step's problems (`rollout`), those that find none
left train the drafter (`spot_trainer`), the answers are rewarded in worker
processes (`rewards`), the policy is updated (`update`). Several processes share
the answers (`hosts`). `train` begins with what is missing: a model made from
worked examples, a first drafter.
"""

import pathlib

from efficient_llm.tlt import finish
from efficient_llm.tlt import start as start_lib
from efficient_llm.tlt import trainer as trainer_lib
from efficient_llm.tlt.config import TltConfig
from efficient_llm.training import loop as loop_lib


def train(
  config: TltConfig, *, workdir: str | pathlib.Path
) -> loop_lib.Outcome:
  """Runs all stages and writes result.json, report.html and the drafter.

  A second call with the same working directory continues the first.

  Raises:
    ValueError: If the configuration, the checkpoint or the task will not do.
    RewardError: If the reward function fails and the configuration says stop.
    ProcessError: If a step failed in another process, or that one did not come.
  """
  config.validate()
  workdir = pathlib.Path(workdir).absolute()
  start = start_lib.prepare(config, workdir)
  if isinstance(start, loop_lib.Outcome):
    return start
  with trainer_lib.Trainer(config, start) as trainer:
    outcome = loop_lib.run(
      config.loop,
      loop_lib.Task(
        title='tlt',
        step=trainer.step,
        batches=trainer,
        place=lambda batch: batch,
        evaluate=trainer.evaluate,
        metadata=finish.metadata(config, start.target),
      ),
      make_state=trainer.init_state,
      abstract_state=trainer.abstract_state,
      workdir=workdir,
    )
  if outcome.stopped_by is None:
    finish.write(config, outcome, workdir=workdir)
  return outcome
