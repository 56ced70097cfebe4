"""What the line will need, stage by stage, before it is paid for."""

import dataclasses
import pathlib
from collections.abc import Callable

from efficient_llm.end_to_end.config import EndToEndConfig
from efficient_llm.training import planner
from efficient_llm.training.config import PretrainConfig

_NOWHERE = pathlib.Path('later')
NOT_COUNTED = (
  'Not counted: compiling, evaluations, the operator and its trials, the '
  'drafter, reinforcement learning.'
)


def plan(
  config: EndToEndConfig, plan_run: Callable[[PretrainConfig], planner.Plan]
) -> dict[str, planner.Plan]:
  """Plans what the line trains.

  Equal steps are compiled once: growth and data-parallel training take the
  target's, and islands at most as long for as many tokens.

  Args:
    config: The line.
    plan_run: `planner.plan` for some devices.
  Returns:
    The plan of every stage that trains, by its name.
  """
  rungs = {
    f'rung {number}': plan_run(rung)
    for number, rung in enumerate(config.rungs(_NOWHERE), 1)
  }
  target = plan_run(config.scratch(_NOWHERE))
  islands = _lasting(target, config.islands.num_steps)
  return {
    **rungs,
    'target from nothing': target,
    'target grown': _lasting(target, config.growth.num_steps),
    'islands': islands,
    'data-parallel': islands,
    'worked problems': plan_run(config.reasoned(start=_NOWHERE).supervised),
  }


def _lasting(one: planner.Plan, num_steps: int) -> planner.Plan:
  """The same step, another number of times."""
  estimate = one.estimate
  if estimate is not None:
    secs = estimate.step_secs * num_steps
    estimate = dataclasses.replace(estimate, total_secs=secs)
  return dataclasses.replace(one, num_steps=num_steps, estimate=estimate)
