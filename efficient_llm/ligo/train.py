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
import json
import pathlib
from typing import Any

import jax

from efficient_llm.ligo import auto, card, depth, learning, methods, pair
from efficient_llm.ligo import stage as stage_lib
from efficient_llm.ligo import state as growth_state
from efficient_llm.ligo.config import InheritConfig, LigoConfig
from efficient_llm.models.config import TransformerConfig
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
  _check_growth(config, small.model)
  if config.moments:
    growth_state.check_moments(small, config.optimizer)
  card.check_scratch(config)
  # From here on the run is of this small model.
  _pin(small, workdir)
  if small.model.sizes == config.model.sizes:
    # Nothing to choose or to learn.
    learn = dataclasses.replace(config.learn, num_steps=0)
    method = 'stack' if config.method == 'auto' else config.method
    config = dataclasses.replace(config, method=method, learn=learn)
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
    config = _with_resting(config, small.model)
  begin = methods.build(method, small.model, config.model, seed=config.seed)
  stage = stage_lib.Stage(config, small, begin, workdir)
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
      make_step=stage.step_maker,
    ),
  )


def _in_stages(config: LigoConfig, workdir: pathlib.Path) -> loop_lib.Outcome:
  """Grows and trains every model on the way, and the large one out of them."""
  stages, config = config.stages, dataclasses.replace(config, stages=())
  small = trained_run.find(config.small, name='small', step=config.small_step)
  runs = []
  for number, stage in enumerate(stages, 1):
    run = config.aside(
      workdir,
      model=stage.model(config.model),
      method=stage.method or config.method,
      rest_old=stage.rest_old,
      sub_model_layers=stage.sub_model_layers,
      inherit=InheritConfig(),
      loop=dataclasses.replace(config.loop, num_steps=stage.num_steps),
    )
    # No stage reads again what the one before began with.
    data = dataclasses.replace(run.data, seed=run.data.seed + 1000 * number)
    runs.append(dataclasses.replace(run, data=data))
  # Before hours are spent on the first.
  before = small.model
  for run in [*runs, config]:
    run.validate()
    _check_growth(run, before)
    before = run.model
  card.check_scratch(config)
  beginning = {'small': config.small, 'small_step': config.small_step}
  for number, run in enumerate(runs):
    folder = workdir / card.STAGES / str(number)
    outcome = train(dataclasses.replace(run, **beginning), workdir=folder)
    if outcome.stopped_by is not None:
      return outcome
    beginning = {'small': str(folder), 'small_step': None}
  return train(dataclasses.replace(config, **beginning), workdir=workdir)


def _check_growth(config: LigoConfig, small: TransformerConfig) -> None:
  """Refuses what could not be run; makes no parameters."""
  pair.check(small, config.model)
  if config.resting_layers:
    raise ValueError(
      f'resting_layers={config.resting_layers} follows from rest_old here; '
      'leave it empty.'
    )
  candidates = [config]
  if config.method == 'auto':
    candidates = list(auto.trials(config, small).values())
  for one in candidates:
    if one.rest_old:
      _with_resting(one, small)
    operator = jax.eval_shape(
      functools.partial(
        methods.build,
        methods.get(one.method),
        small,
        one.model,
        seed=one.seed,
      )
    )
    if one.learn.num_steps:
      learning.check(operator)
    if one.moments and not operator.terms:
      raise ValueError(
        f'moments=True needs a method that keeps the small model, and '
        f'{one.method!r} does not; set it to False.'
      )


def _with_resting(config: LigoConfig, small: TransformerConfig) -> LigoConfig:
  """The configuration with the small model's layers at rest.

  Raises:
    ValueError: If more grows than the number of layers, or not even that.
  """
  grown = [
    name
    for name, size in config.model.sizes.items()
    if size != small.sizes[name]
  ]
  if grown != ['layers']:
    raise ValueError(
      f'rest_old=True needs a model that grows in layers alone, and '
      f'{", ".join(grown) or "nothing"} grows; set it to False.'
    )
  old = depth.old_layers(methods.get(config.method), small, config.model)
  return dataclasses.replace(config, resting_layers=old)


def _pin(small: trained_run.TrainedRun, workdir: pathlib.Path) -> None:
  """Writes down which checkpoint the run grows out of, the first time."""
  path = workdir / _SMALL_FILE
  if jax.process_index() == 0 and not path.is_file():
    workdir.mkdir(parents=True, exist_ok=True)
    strict_json.write_atomically(path, strict_json.to_json(small.describe()))


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
