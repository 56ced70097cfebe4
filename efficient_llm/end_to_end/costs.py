"""What the line will need, stage by stage, before it is paid for."""

import dataclasses
import pathlib
from typing import Any

import jax

from efficient_llm import sharding
from efficient_llm.diloco import mesh as mesh_lib
from efficient_llm.diloco.config import DilocoConfig
from efficient_llm.end_to_end.config import EndToEndConfig
from efficient_llm.training import ahead_of_time, planner, topology
from efficient_llm.training.config import PretrainConfig

_NOWHERE = pathlib.Path('later')
ASSUMPTIONS = (
  "Steps of growth, of islands and of data-parallel training take the target's "
  'time.',
  'Not counted: compiling, evaluations, the operator and its trials, outer '
  'steps, the drafter, reinforcement learning.',
)


def plan(
  config: EndToEndConfig, where: topology.Topology, **options: Any
) -> dict[str, planner.Plan]:
  """Plans what the line trains.

  Rungs, target, an island's step and the worked problems are compiled.

  Args:
    config: The line.
    where: The devices.
    **options: Of `planner.plan`.
  Returns:
    The plan of every stage that trains, by its name. What to change where one
    does not fit is named as in the line's configuration.
  """

  def planned(run: PretrainConfig, group: str) -> planner.Plan:
    return _named(planner.plan(run, where, **options), group)

  rungs = {
    f'rung {number}': planned(rung, 'target')
    for number, rung in enumerate(config.rungs(_NOWHERE), 1)
  }
  target = planned(config.scratch(_NOWHERE), 'target')
  parallel = _lasting(target, config.islands.num_steps)
  islands = config.distributed(_NOWHERE, start=_NOWHERE)
  return {
    **rungs,
    'target from nothing': target,
    'target grown': _lasting(target, config.growth.num_steps),
    'islands': _on_islands(
      parallel, islands, where, fast=options.get('fast', False)
    ),
    'data-parallel': parallel,
    'worked problems': planned(
      config.reasoned(start=_NOWHERE).supervised, 'reasoning.supervised'
    ),
  }


def _named(one: planner.Plan, group: str) -> planner.Plan:
  """With the remedy's flags as the line's configuration has them."""
  remedy = one.remedy
  if remedy is None:
    return one
  flags = tuple(
    # The model is the target's everywhere.
    flag.replace('--config.model.', '--config.target.model.')
    if flag.startswith('--config.model.')
    else flag.replace('--config.', f'--config.{group}.')
    for flag in remedy.flags
  )
  return dataclasses.replace(
    one, remedy=dataclasses.replace(remedy, flags=flags)
  )


def _lasting(one: planner.Plan, num_steps: int) -> planner.Plan:
  """The same step, another number of times."""
  estimate = one.estimate
  if estimate is not None:
    secs = estimate.step_secs * num_steps
    estimate = dataclasses.replace(estimate, total_secs=secs)
  return dataclasses.replace(one, num_steps=num_steps, estimate=estimate)


def _on_islands(
  parallel: planner.Plan,
  config: DilocoConfig,
  where: topology.Topology,
  *,
  fast: bool,
) -> planner.Plan:
  """Data-parallel training's plan with the memory of islands."""
  mesh = sharding.make_mesh(config.mesh, devices=where.devices)
  step = _InnerStep(mesh_lib.build(config, mesh), config.islands)
  compiled = ahead_of_time.compile_step(step, where, fast=fast)
  memory, fits = compiled.memory, compiled.fits
  if memory.peak is not None:
    # What all share rests beside the step.
    peak = memory.peak + step.resting_bytes
    memory = dataclasses.replace(memory, peak=peak)
    fits = fits and (memory.limit is None or peak <= memory.limit)
  return dataclasses.replace(
    parallel,
    mesh=dict(mesh.shape),
    memory=memory,
    peak_bytes_per_device=memory.peak,
    fits=fits,
    remedy=None,
    collectives=(),
    memory_traffic_bytes_per_device=None,
    compile_secs=compiled.secs,
  )


class _InnerStep:
  """An island's step, as `ahead_of_time.compile_step` takes programs.

  Args:
    program: Of the islands.
    num_islands: How many.
  """

  def __init__(self, program: mesh_lib.Program, num_islands: int):
    whole = program.abstract_state(num_islands)
    self.abstract_state = (whole.step, whole.islands, whole.tokens_PM)
    self.abstract_batch = program.abstract_batch
    self.mesh = program.mesh
    self.resting_bytes = ahead_of_time.device_bytes(
      whole
    ) - ahead_of_time.device_bytes(self.abstract_state)
    self._program = program

  @property
  def train_step(self) -> '_InnerStep':
    return self

  def trace(self, state: Any, batch: Any) -> jax.stages.Traced:
    return self._program.inner_step.trace(*state, batch)
