"""Fine-tuning a trained model on texts with labels.

READ FIRST for classification: `train` is what `experiments.classify` calls.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
from absl import logging

from efficient_llm import sharding
from efficient_llm.data import labelled
from efficient_llm.models import transformer
from efficient_llm.training import (
  batch_layout,
  classifier,
  evaluation,
  interchange,
  results,
  saved_run,
  step_folders,
  strict_json,
  trained_run,
)
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import state as state_lib


def train(
  config: classifier.ClassifyConfig, *, workdir: str | pathlib.Path
) -> loop_lib.Outcome:
  """Trains, evaluates and writes result.json and report.html.

  A second call with the same working directory continues the first.

  Raises:
    ValueError: If the model or the rows will not do.
  """
  config.validate()
  workdir = pathlib.Path(workdir)
  start = trained_run.find(config.start, name='start')
  _check_model(start.model, config)
  begun = _beginning(start, workdir)
  dataset, validation = labelled.open_both(config.data, start.load_tokenizer())
  config = config.with_steps(dataset.num_sequences)
  labels = dataset.classes.names
  logging.info(
    'data: %d rows of %d labels, %d rows to validate on',
    dataset.num_sequences,
    len(labels),
    validation.num_sequences if validation else 0,
  )
  mesh = sharding.make_mesh(config.mesh)
  program = classifier.build(config, start.model, dataset, mesh)
  share = batch_layout.process_share(
    program.batch_sharding, config.data.batch_size
  )
  place = functools.partial(sharding.to_global, sharding=program.batch_sharding)

  def make_state() -> state_lib.TrainState:
    state = program.init_state()
    params = interchange.read_sharded(start, config.mesh)
    return state.replace(params={**params, 'head': state.params['head']})

  num_tokens = config.data.sequence_length
  flops_per_row = num_tokens * transformer.flops_per_token(
    classifier.head_of(start.model, len(labels)), num_tokens=num_tokens
  )
  found = {'start': begun, 'labels': list(labels)}
  with (
    jax.set_mesh(mesh),
    contextlib.closing(dataset.iterate(process=share)) as batches,
  ):
    outcome = loop_lib.run(
      config.loop,
      loop_lib.Task(
        title='classify',
        step=program.train_step,
        batches=batches,
        place=place,
        evaluate=evaluation.of_state(
          validation,
          eval_step=program.eval_step,
          place=place,
          num_batches=config.loop.eval_batches,
          process=share,
        ),
        metadata={**_as_data(config, start.model), **found},
        unit='rows',
        flops_per_token=flops_per_row,
      ),
      make_state=make_state,
      abstract_state=program.abstract_state,
      workdir=workdir,
    )
  if outcome.stopped_by is None:
    result = {
      'unit': 'rows',
      'num_params': sum(x.size for x in jax.tree.leaves(outcome.state.params)),
      'num_steps': int(outcome.state.step),
      'num_tokens': outcome.num_tokens,
      'flops': outcome.num_tokens * flops_per_row,
      'train_secs': outcome.train_secs,
      **{f'eval_{name}': x for name, x in outcome.eval_metrics.items()},
      **found,
      'data': dataset.statistics(),
      'validation_data': validation.statistics() if validation else None,
      'config': dataclasses.asdict(config),
    }
    results.finish(result, workdir=workdir, title='Classification')
  return outcome


def _check_model(
  model: transformer.TransformerConfig, config: classifier.ClassifyConfig
) -> None:
  """Refuses what cannot read the rows."""
  if model.reads_images:
    raise ValueError(
      f'start={config.start!r} must be of a model of text, and reads images; '
      'choose another.'
    )
  if config.data.sequence_length > model.max_positions:
    raise ValueError(
      f'data.sequence_length={config.data.sequence_length} must not exceed the '
      f'{model.max_positions} positions of the model; lower it.'
    )


def _beginning(
  start: trained_run.TrainedRun, workdir: pathlib.Path
) -> dict[str, Any]:
  """Which checkpoint the run began with; its run may have trained on since.

  Raises:
    ValueError: If the working directory is of another run.
  """
  checkpoints = workdir / 'checkpoints'
  if not step_folders.steps(checkpoints):
    return start.describe()
  begun = saved_run.read_metadata(checkpoints).get('start', {})
  if begun.get('workdir') != start.reference:
    raise ValueError(
      f'--workdir={workdir} must be new or of a run that began with '
      f'{start.reference}, and is not; choose another.'
    )
  return begun


def _as_data(
  config: classifier.ClassifyConfig, model: transformer.TransformerConfig
) -> dict[str, Any]:
  """As JSON has them."""
  parts = {
    'config': dataclasses.asdict(config),
    'model': dataclasses.asdict(model),
  }
  return json.loads(strict_json.to_json(parts))
