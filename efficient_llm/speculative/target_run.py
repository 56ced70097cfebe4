"""The run whose model a drafter drafts for."""

import pathlib
from collections.abc import Mapping
from typing import Any

from efficient_llm.training import trained_run

TargetRun = trained_run.TrainedRun


def find(
  workdir: str | pathlib.Path,
  *,
  step: int | None = None,
  name: str = '--target',
) -> TargetRun:
  """Finds the newest whole checkpoint of a run that can have a drafter.

  Args:
    workdir: Folder of a pre-training run.
    step: Take this one or fail.
    name: What the user calls it.
  Raises:
    ValueError: If there is none, or the model is not causal.
  """
  target = trained_run.find(workdir, name=name, step=step)
  if not target.model.causal:
    raise ValueError(
      f'{name}={target.workdir} must be a causal model, as only such a one '
      'can have a drafter; choose another.'
    )
  return target


def check_same(
  target: TargetRun, described: Mapping[str, Any], *, drafter: str
) -> None:
  """Raises ValueError if a drafter was trained for another checkpoint.

  Args:
    target: The run that is drafted for.
    described: What the drafter's run says of its target, from
      `TargetRun.describe`.
    drafter: How the drafter was named, for the message.
  """
  if described['digest'] != target.digest:
    raise ValueError(
      f'{drafter} was trained for another checkpoint, of '
      f'{described["workdir"]}; train one for this target.'
    )
