"""Training on text, or on images with classes: configuration, program, run.

READ FIRST of the package: `train` is what `experiments.pretrain` calls, and
what scaling ladders call for every rung.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding
from efficient_llm.models import attention, transformer
from efficient_llm.training import (
  batch_layout,
  datasets,
  evaluation,
  objectives,
  results,
  samples,
  sections,
  step,
  trained_run,
)
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import program as program_lib
from efficient_llm.training import state as state_lib
from efficient_llm.training.config import PretrainConfig

__all__ = [
  'Beginning',
  'Parts',
  'PretrainConfig',
  'Program',
  'build',
  'make_parts',
  'train',
]

Parts = program_lib.Parts
Program = program_lib.Program


def build(config: PretrainConfig, mesh: Mesh) -> Program:
  """Puts model, optimiser and shardings together; compiles nothing yet.

  Args:
    config: The run.
    mesh: Its devices, which may be compile-only ones.
  Raises:
    ValueError: If the model or the batch does not fit the mesh.
  """
  batch = batch_layout.abstract_batch(
    config.data, sharding.batch_sharding(mesh)
  )
  return program_lib.lay_out(
    make_parts(config, mesh),
    mesh,
    batch,
    num_microbatches=config.loop.num_microbatches,
    seed=config.seed,
  )


def make_parts(config: PretrainConfig, mesh: Mesh) -> Parts:
  """Puts model, loss and optimiser together.

  Args:
    config: The run.
    mesh: Whose platform decides how attention is computed.
  """
  model = dataclasses.replace(
    config.model,
    attention_implementation=attention.choose(
      config.model.attention_implementation, mesh.devices.flat[0].platform
    ),
  )
  axes = transformer.logical_axes(model)
  optimizer = optimizer_lib.resting(
    optimizer_lib.make_optimizer(
      config.optimizer, axes, num_steps=config.loop.num_steps
    ),
    config.resting_layers,
  )

  def init_state(key: jax.Array) -> state_lib.TrainState:
    init_key, train_key = jax.random.split(key)
    params = transformer.init(model, init_key)
    return state_lib.create(params, optimizer, train_key)

  train_step = step.make_train_step(
    objectives.language_model_loss(
      model, z_loss=config.z_loss, num_resting=config.num_resting
    ),
    optimizer,
    num_microbatches=config.loop.num_microbatches,
    skip_nonfinite=config.loop.nonfinite == 'skip',
  )
  eval_loss = objectives.language_model_loss(model)
  return Parts(axes, init_state, train_step, eval_loss)


@dataclasses.dataclass(frozen=True)
class Beginning:
  """Where a run begins that does not begin with new parameters.

  Attributes:
    title: Heading of the report.
    make_state: Program -> the state of step 0, where there is no checkpoint.
    describe: At the end, what result.json and the report say beyond the usual.
    make_step: Program -> the step, compiled on first use, where it is not the
      program's own.
  """

  title: str
  make_state: Callable[[Program], state_lib.TrainState]
  describe: Callable[[], tuple[dict[str, Any], Sequence[sections.Section]]]
  make_step: Callable[[Program], step.TrainStep] | None = None


def train(
  config: PretrainConfig,
  *,
  workdir: str | pathlib.Path,
  beginning: Beginning | None = None,
) -> loop_lib.Outcome:
  """Trains, evaluates, samples and writes result.json and report.html.

  A second call with the same working directory continues the first.

  Args:
    config: The run.
    workdir: Its folder.
    beginning: Where it begins, if not with new parameters.
  """
  config.validate()
  workdir = pathlib.Path(workdir)
  mesh = sharding.make_mesh(config.mesh)
  program = build(config, mesh)
  dataset, validation = datasets.open_both(
    config.data, cache_dir=workdir / 'cache'
  )
  datasets.check_vocabulary(config.model, dataset)
  prompts = samples.encode(
    config.sample_prompts,
    datasets.tokenizer_of(dataset),
    config.model,
    config.sampling,
  )
  share = batch_layout.process_share(
    program.batch_sharding, config.data.batch_size
  )
  place = functools.partial(sharding.to_global, sharding=program.batch_sharding)
  num_params = transformer.num_params(config.model)
  logging.info(
    'Model: %s parameters; %s', f'{num_params:,}', _describe_mesh(mesh)
  )

  make_state = program.init_state
  if beginning:
    make_state = functools.partial(beginning.make_state, program)
  elif config.start:
    make_state = functools.partial(_started, program, config)
  evaluate = evaluation.of_state(
    validation,
    eval_step=program.eval_step,
    place=place,
    num_batches=config.loop.eval_batches,
    process=share,
  )
  train_step = program.train_step
  if beginning and beginning.make_step:
    train_step = beginning.make_step(program)
  with (
    jax.set_mesh(mesh),
    contextlib.closing(dataset.iterate(process=share)) as batches,
  ):
    outcome = loop_lib.run(
      config.loop,
      loop_lib.Task(
        title='pretrain',
        step=train_step,
        batches=batches,
        place=place,
        evaluate=evaluate,
        metadata=results.checkpoint_metadata(config, dataset),
        unit=config.unit,
        flops_per_token=config.flops_per_token,
      ),
      make_state=make_state,
      abstract_state=program.abstract_state,
      workdir=workdir,
    )
    if outcome.stopped_by is None:
      result = results.describe(
        config, outcome, dataset=dataset, prompts=prompts, mesh=mesh
      )
      title, more = 'Pre-training', ()
      if beginning:
        title = beginning.title
        found, more = beginning.describe()
        result |= found
      results.finish(result, workdir=workdir, title=title, more=more)
  return outcome


def _started(program: Program, config: PretrainConfig) -> state_lib.TrainState:
  """The state of step 0 with the parameters of another run.

  Raises:
    ValueError: If there are none, or they are of another model.
  """
  params = trained_run.start_params(
    config.start, config.model, program.abstract_state.params
  )
  return program.init_state().replace(params=params)


def _describe_mesh(mesh: Mesh) -> str:
  device = mesh.devices.flat[0]
  shape = ', '.join(f'{name} {size}' for name, size in mesh.shape.items())
  return f'{mesh.size} x {device.device_kind} ({shape})'
