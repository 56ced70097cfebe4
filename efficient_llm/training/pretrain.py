"""Training a language model on text: configuration, program, run.

READ FIRST of the package: `train` is what `experiments.pretrain` calls, and
what scaling ladders call for every rung.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding
from efficient_llm.data import pipeline
from efficient_llm.models import attention, transformer
from efficient_llm.models import sampling as sampling_lib
from efficient_llm.training import (
  batch_layout,
  datasets,
  evaluation,
  objectives,
  report,
  samples,
  step,
  strict_json,
)
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """All there is to a pre-training run.

  Attributes:
    sampling: How the samples at the end are drawn (causal models).
    sample_prompts: Their beginnings; empty for none.
    z_loss: Weight of the log-partition penalty.
    seed: Of the initial parameters; data.seed orders the data.
  """

  model: transformer.TransformerConfig = transformer.TransformerConfig()
  data: pipeline.DataConfig = pipeline.DataConfig()
  optimizer: optimizer_lib.OptimizerConfig = optimizer_lib.OptimizerConfig()
  loop: loop_lib.LoopConfig = loop_lib.LoopConfig()
  mesh: sharding.MeshConfig = sharding.MeshConfig()
  sampling: sampling_lib.SamplingConfig = sampling_lib.SamplingConfig()
  sample_prompts: tuple[str, ...] = ()
  z_loss: float = 0.0
  seed: int = 0

  def validate(self) -> None:
    """Checks every part and the rules across them, before any compilation."""
    for field in dataclasses.fields(self):
      part = getattr(self, field.name)
      if hasattr(part, 'validate'):
        part.validate()
    if self.data.sequence_length > self.model.max_positions:
      raise ValueError(
        f'data.sequence_length={self.data.sequence_length} must not exceed '
        f'model.max_positions={self.model.max_positions}; change one of them.'
      )
    if self.data.batch_size % self.loop.num_microbatches:
      raise ValueError(
        f'data.batch_size={self.data.batch_size} must be divisible by '
        f'loop.num_microbatches={self.loop.num_microbatches}; change one of '
        'them.'
      )
    if self.model.causal != (self.data.objective == 'causal'):
      raise ValueError(
        f'model.causal={self.model.causal} needs data.objective='
        f'{"causal" if self.model.causal else "masked"}, got '
        f'{self.data.objective!r}.'
      )
    optimizer_lib.make_schedule(self.optimizer, num_steps=self.loop.num_steps)


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled-on-first-use functions of a run and what they work on.

  Attributes:
    mesh: The device mesh; calls happen inside `jax.set_mesh(mesh)`.
    train_step: (state, batch) -> (state, metrics), donating the state.
    eval_step: (params, batch) -> Loss.
    init_state: Makes the state of step 0, already sharded.
    abstract_state: Shapes, dtypes and shardings of the state.
    abstract_batch: The same for a batch.
    batch_sharding: Where a batch's rows lie.
  """

  mesh: Mesh
  train_step: step.TrainStep
  eval_step: step.EvalStep
  init_state: Callable[[], state_lib.TrainState]
  abstract_state: state_lib.TrainState
  abstract_batch: Mapping[str, jax.ShapeDtypeStruct]
  batch_sharding: jax.sharding.NamedSharding


def build(config: PretrainConfig, mesh: Mesh) -> Program:
  """Puts model, optimiser and shardings together; compiles nothing yet.

  Args:
    config: The run.
    mesh: Its devices, which may be compile-only ones.
  Raises:
    ValueError: If the model or the batch does not fit the mesh.
  """
  platform = mesh.devices.flat[0].platform
  model = dataclasses.replace(
    config.model,
    attention_implementation=attention.choose(
      config.model.attention_implementation, platform
    ),
  )
  axes = transformer.logical_axes(model)
  optimizer = optimizer_lib.make_optimizer(
    config.optimizer, axes, num_steps=config.loop.num_steps
  )

  def init_state(key: jax.Array) -> state_lib.TrainState:
    init_key, train_key = jax.random.split(key)
    params = transformer.init(model, init_key)
    return state_lib.create(params, optimizer, train_key)

  shapes = jax.eval_shape(init_state, jax.random.key(0))
  shardings = state_lib.shardings(shapes, axes, mesh)
  batch_sharding = sharding.batch_sharding(mesh)
  batch_layout.check_batch_size(
    config.data.batch_size,
    batch_sharding,
    num_microbatches=config.loop.num_microbatches,
  )
  loss_fn = objectives.language_model_loss(model, z_loss=config.z_loss)
  train_step = step.make_train_step(
    loss_fn,
    optimizer,
    num_microbatches=config.loop.num_microbatches,
    skip_nonfinite=config.loop.nonfinite == 'skip',
  )
  eval_loss = objectives.language_model_loss(model)
  return Program(
    mesh=mesh,
    train_step=step.jit_train_step(train_step, shardings, batch_sharding),
    eval_step=step.jit_eval_step(eval_loss, shardings, batch_sharding),
    init_state=functools.partial(
      jax.jit(init_state, out_shardings=shardings), jax.random.key(config.seed)
    ),
    abstract_state=state_lib.abstract(shapes, shardings),
    abstract_batch=batch_layout.abstract_batch(config.data, batch_sharding),
    batch_sharding=batch_sharding,
  )


def train(
  config: PretrainConfig, *, workdir: str | pathlib.Path
) -> loop_lib.Outcome:
  """Trains, evaluates, samples and writes result.json and report.html.

  A second call with the same working directory continues the first.
  """
  config.validate()
  workdir = pathlib.Path(workdir)
  mesh = sharding.make_mesh(config.mesh)
  program = build(config, mesh)
  dataset, validation = datasets.open_both(
    config.data, cache_dir=workdir / 'cache'
  )
  datasets.check_vocabulary(config.model, dataset.tokenizer)
  prompts = samples.encode(
    config.sample_prompts, dataset.tokenizer, config.model, config.sampling
  )
  share = batch_layout.process_share(
    program.batch_sharding, config.data.batch_size
  )
  place = functools.partial(sharding.to_global, sharding=program.batch_sharding)
  num_params = transformer.num_params(config.model)
  logging.info(
    'Model: %s parameters; %s', f'{num_params:,}', _describe_mesh(mesh)
  )

  evaluate = None
  if validation is not None:
    evaluate = functools.partial(
      evaluation.evaluate,
      validation,
      eval_step=program.eval_step,
      place=place,
      num_batches=config.loop.eval_batches,
      process=share,
    )
  flops_per_token = transformer.flops_per_token(
    config.model, num_tokens=config.data.sequence_length
  )
  with (
    jax.set_mesh(mesh),
    contextlib.closing(dataset.iterate(process=share)) as batches,
  ):
    outcome = loop_lib.run(
      config.loop,
      loop_lib.Task(
        title='pretrain',
        step=program.train_step,
        batches=batches,
        place=place,
        evaluate=evaluate,
        metadata=checkpoint_metadata(config, dataset),
        flops_per_token=flops_per_token,
      ),
      make_state=program.init_state,
      abstract_state=program.abstract_state,
      workdir=workdir,
    )
    if outcome.stopped_by is None:
      written = samples.draw(
        prompts,
        outcome.state.params,
        model=config.model,
        config=config.sampling,
        tokenizer=dataset.tokenizer,
        mesh=mesh,
        seed=config.seed,
      )
      result = {
        'num_params': num_params,
        'num_steps': int(outcome.state.step),
        'num_tokens': outcome.num_tokens,
        'flops': outcome.num_tokens * flops_per_token,
        'train_secs': outcome.train_secs,
        **_named(outcome.eval_metrics),
        'data': dataset.statistics(),
        'samples': written,
        'config': dataclasses.asdict(config),
      }
      finish(result, workdir=workdir, title='Pre-training')
  return outcome


def finish(
  result: Mapping[str, Any], *, workdir: pathlib.Path, title: str
) -> None:
  """Writes result.json and report.html, on the first process only."""
  if jax.process_index() != 0:
    return
  report.write_result(workdir, result)
  report.write_report(
    workdir, title=title, sections=report.training_sections(workdir)
  )


def checkpoint_metadata(
  config: PretrainConfig, dataset: pipeline.Dataset
) -> dict[str, Any]:
  """What a reader of a checkpoint needs besides the arrays."""
  as_data = json.loads(strict_json.to_json(dataclasses.asdict(config)))
  return {
    'config': as_data,
    'model': as_data['model'],
    'tokenizer': {
      'name': config.data.tokenizer,
      'fingerprint': dataset.tokenizer.fingerprint,
    },
  }


def _named(eval_metrics: Mapping[str, float]) -> dict[str, float]:
  """As the result calls them."""
  return {
    name if name == 'bits_per_byte' else f'eval_{name}': value
    for name, value in eval_metrics.items()
  }


def _describe_mesh(mesh: Mesh) -> str:
  device = mesh.devices.flat[0]
  shape = ', '.join(f'{name} {size}' for name, size in mesh.shape.items())
  return f'{mesh.size} x {device.device_kind} ({shape})'
