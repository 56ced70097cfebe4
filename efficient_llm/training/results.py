"""What a training run says of itself: in checkpoints and at its end."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from efficient_llm.data import dataset as dataset_lib
from efficient_llm.data import images, tokenizer
from efficient_llm.models import transformer
from efficient_llm.training import (
  datasets,
  report,
  samples,
  sections,
  strict_json,
  task,
)
from efficient_llm.training.config import PretrainConfig


def describe(
  config: PretrainConfig,
  outcome: task.Outcome,
  *,
  dataset: dataset_lib.Dataset,
  prompts: samples.Prompts | None,
  mesh: Mesh,
) -> dict[str, Any]:
  """What result.json says of a run, samples of its model included."""
  written = samples.draw(
    prompts,
    outcome.state.params,
    model=config.model,
    config=config.sampling,
    tokenizer=datasets.tokenizer_of(dataset),
    mesh=mesh,
    seed=config.seed,
  )
  unit = {'unit': 'images'} if config.model.reads_images else {}
  return {
    **unit,
    'num_params': transformer.num_params(config.model),
    'num_steps': int(outcome.state.step),
    'num_tokens': outcome.num_tokens,
    'flops': outcome.num_tokens * config.flops_per_token,
    'train_secs': outcome.train_secs,
    **_named(outcome.eval_metrics),
    'data': dataset.statistics(),
    'samples': written,
    'config': dataclasses.asdict(config),
  }


def finish(
  result: Mapping[str, Any],
  *,
  workdir: pathlib.Path,
  title: str,
  more: Sequence[sections.Section] = (),
) -> None:
  """Writes result.json and report.html, on the first process only.

  Args:
    result: From `describe`.
    workdir: Folder of the run.
    title: Heading of the report.
    more: Its last sections.
  """
  if jax.process_index() != 0:
    return
  report.write_result(workdir, result)
  report.write_report(
    workdir,
    title=title,
    sections=[*report.training_sections(workdir), *more],
  )


def checkpoint_metadata(
  config: PretrainConfig, dataset: dataset_lib.Dataset
) -> dict[str, Any]:
  """What a reader of a checkpoint needs besides the arrays.

  Under 'tokenizer' is what the targets stand for, the classes of images too.
  """
  vocabulary: dict[str, Any] = {'name': config.data.tokenizer}
  if isinstance(dataset, images.Dataset):
    vocabulary = {'name': 'classes', 'classes': list(dataset.classes.names)}
  return _metadata(
    config, {**vocabulary, 'fingerprint': dataset.vocabulary.fingerprint}
  )


def metadata_without_data(config: PretrainConfig) -> dict[str, Any]:
  """As `checkpoint_metadata`, of a run whose text is elsewhere.

  Raises:
    ValueError: If the tokenizer's file is not here.
  """
  name = config.data.tokenizer
  fingerprint = tokenizer.load(name).fingerprint
  return _metadata(config, {'name': name, 'fingerprint': fingerprint})


def _metadata(
  config: PretrainConfig, vocabulary: Mapping[str, Any]
) -> dict[str, Any]:
  as_data = json.loads(strict_json.to_json(dataclasses.asdict(config)))
  return {
    'config': as_data,
    'model': as_data['model'],
    'tokenizer': dict(vocabulary),
  }


def _named(eval_metrics: Mapping[str, float]) -> dict[str, float]:
  """As the result calls them."""
  return {
    name if name == 'bits_per_byte' else f'eval_{name}': value
    for name, value in eval_metrics.items()
  }
