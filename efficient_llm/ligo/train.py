"""From a trained small model to a larger one: learn, grow, train on.

READ FIRST of the package: `train` is what `experiments.ligo` calls. The stages
have a folder each under the working directory, and a run that was stopped goes
on in the stage it was in:

    stages/         models on the way, each a run like this one
    probes/         trials of several methods, where the best is asked for
    small.json      which checkpoint of the small model it is
    operator/       learning the growth operator, where that is asked for
    growth.json     the growth card: what was kept and what it cost
    checkpoints/    the large model, from its first step on
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any

import jax

from efficient_llm.ligo import auto, card, depth, methods, pair
from efficient_llm.ligo import stage as stage_lib
from efficient_llm.ligo import state as growth_state
from efficient_llm.ligo.config import LigoConfig
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import (
  pretrain,
  processes,
  step_folders,
  strict_json,
  trained_run,
)

_SMALL_FILE = 'small.json'


def train(
  config: LigoConfig, *, workdir: str | pathlib.Path
) -> loop_lib.Outcome:
  """Grows a model, trains it and writes result.json and report.html.

  A second call with the same working directory continues the first.

  Raises:
    ValueError: If the models do not go together.
  """
  config.validate()
  workdir = pathlib.Path(workdir)
  _check_workdir(workdir)
  if config.stages:
    return _in_stages(config, workdir)
  small = _find_small(config, workdir)
  pair.check(small.model, config.model)
  if config.moments:
    growth_state.check_moments(small, config.optimizer)
  card.check_scratch(config)
  probes: list[dict[str, Any]] = []
  if config.method == 'auto':
    found = auto.choose(
      dataclasses.replace(config, small_step=small.step),
      lambda trial, folder: train(trial, workdir=folder),
      small=small.model,
      workdir=workdir,
    )
    if isinstance(found, loop_lib.Outcome):
      return found
    config, probes = found
  method = methods.get(config.method)
  if config.rest_old:
    config = dataclasses.replace(
      config,
      resting_layers=depth.old_layers(method, small.model, config.model),
    )
    config.validate()
  begin = methods.build(method, small.model, config.model, seed=config.seed)
  stage = stage_lib.Stage(config, small, begin, workdir)
  # From here on the run is of this small model.
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    strict_json.write_atomically(
      workdir / _SMALL_FILE, strict_json.to_json(small.describe())
    )
  learned = stage.learn()
  if learned is not None and learned.stopped_by is not None:
    return learned
  return pretrain.train(
    config,
    workdir=workdir,
    beginning=pretrain.Beginning(
      title='Growth',
      make_state=functools.partial(stage.first_state, learned),
      describe=functools.partial(card.describe, config, workdir, probes),
    ),
  )


def _in_stages(config: LigoConfig, workdir: pathlib.Path) -> loop_lib.Outcome:
  """Grows and trains every model on the way, and the large one out of them."""
  stages, config = config.stages, dataclasses.replace(config, stages=())
  small = trained_run.find(config.small, name='small', step=config.small_step)
  models = [stage.model(config.model) for stage in stages]
  # Before hours are spent on the first.
  for before, after in itertools.pairwise([small.model, *models, config.model]):
    pair.check(before, after)
  runs = [
    config.aside(
      workdir,
      model=model,
      method=stage.method or config.method,
      rest_old=stage.rest_old,
      loop=dataclasses.replace(config.loop, num_steps=stage.num_steps),
    )
    for stage, model in zip(stages, models, strict=True)
  ]
  for run in runs:
    run.validate()
  beginning = {'small': config.small, 'small_step': config.small_step}
  for number, run in enumerate(runs):
    folder = workdir / card.STAGES / str(number)
    outcome = train(dataclasses.replace(run, **beginning), workdir=folder)
    if outcome.stopped_by is not None:
      return outcome
    beginning = {'small': str(folder), 'small_step': None}
  return train(dataclasses.replace(config, **beginning), workdir=workdir)


def _check_workdir(workdir: pathlib.Path) -> None:
  """Refuses the folder of a run that did not begin with growth."""
  if step_folders.steps(workdir / 'checkpoints') and not (
    (workdir / card.FILE_NAME).is_file()
  ):
    raise ValueError(
      f'--workdir={workdir} must be new or of a run that grew, and holds '
      'another; choose another.'
    )


def _find_small(
  config: LigoConfig, workdir: pathlib.Path
) -> trained_run.TrainedRun:
  """The small model as it was at the first call, though it trains on."""
  path = workdir / _SMALL_FILE
  first = processes.on_first(
    lambda: json.loads(path.read_bytes()) if path.is_file() else None
  )
  step = config.small_step if first is None else int(first['step'])
  small = trained_run.find(config.small, name='small', step=step)
  if first is not None and first['digest'] != small.digest:
    raise ValueError(
      f'--workdir={workdir} grew out of {first["workdir"]}, not of '
      f'{small.workdir}; choose another.'
    )
  return small
