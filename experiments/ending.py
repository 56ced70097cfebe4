"""What a binary says at the end of a run of training."""

import pathlib

from efficient_llm.training import task
from experiments import runner


def tell(outcome: task.Outcome, workdir: pathlib.Path) -> int:
  """Says where to look, or how to go on; gives the exit code.

  Args:
    outcome: Of the run.
    workdir: Its folder.
  """
  if outcome.stopped_by is not None:
    runner.say(f'Stopped by {outcome.stopped_by}; the same command continues.')
    return runner.STOPPED
  runner.say(f'Report: {workdir / "report.html"}')
  return runner.DONE
