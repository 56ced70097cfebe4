"""Training a drafter on the text of its target's run.

READ FIRST for drafters: `train` is what `experiments.drafter` calls; `build`
gives the step alone, which takes the target's parameters as they are now.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from efficient_llm import sharding, typing
from efficient_llm.data import dataset as dataset_lib
from efficient_llm.data import pipeline
from efficient_llm.models import transformer
from efficient_llm.models.huggingface import hub
from efficient_llm.speculative import (
  drafter,
  drafter_loss,
  drafter_program,
  target_run,
)
from efficient_llm.training import (
  batch_layout,
  chart,
  datasets,
  metrics,
  objectives,
  report,
  saved_run,
  sections,
  step_folders,
  strict_json,
)
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import state as state_lib

DrafterConfig = drafter_program.DrafterConfig
DrafterLossConfig = drafter_loss.DrafterLossConfig
Program = drafter_program.Program
build = drafter_program.build
loss_fn = drafter_loss.loss_fn


def train(
  config: DrafterConfig, *, workdir: str | pathlib.Path
) -> loop_lib.Outcome:
  """Trains, evaluates and writes result.json and report.html.

  A second call with the same working directory continues the first, with the
  checkpoint of the target that it began with.

  Raises:
    ValueError: If the target or the text will not do, or the working directory
      is of another run.
  """
  config.validate()
  workdir = pathlib.Path(workdir).absolute()
  target = _find_target(config, workdir)
  data = config.data(target)
  mesh = sharding.make_mesh(config.mesh)
  program = build(config, target.model, mesh)
  batch_layout.check_batch_size(
    data.batch_size,
    program.batch_sharding,
    num_microbatches=config.loop.num_microbatches,
  )
  dataset, validation = _open_data(data, target, workdir)
  target_params = target.restore_params(program.abstract_target)
  share = batch_layout.process_share(program.batch_sharding, data.batch_size)
  place = functools.partial(sharding.to_global, sharding=program.batch_sharding)
  num_params = drafter.num_params(target.model, form=config.form)
  logging.info(
    'Drafter: %s parameters; target: %s, step %d of %s',
    f'{num_params:,}',
    f'{transformer.num_params(target.model):,}',
    target.step,
    target.workdir,
  )

  def train_step(state: Any, batch: Any) -> tuple[Any, typing.Metrics]:
    return program.train_step(state, batch, target_params)

  def batch_loss(params: typing.Params, batch: typing.Batch) -> objectives.Loss:
    return program.eval_step(params, place(batch), target_params)

  evaluate = None
  if validation is not None:
    evaluate = functools.partial(
      _evaluate,
      validation,
      batch_loss=batch_loss,
      num_batches=config.loop.eval_batches,
      process=share,
    )
  with (
    jax.set_mesh(mesh),
    contextlib.closing(dataset.iterate(process=share)) as batches,
  ):
    outcome = loop_lib.run(
      config.loop,
      loop_lib.Task(
        title='drafter',
        step=train_step,
        batches=batches,
        place=place,
        evaluate=evaluate,
        metadata=_metadata(config, target),
      ),
      make_state=lambda: program.init_state(target_params),
      abstract_state=program.abstract_state,
      workdir=workdir,
    )
  if outcome.stopped_by is None:
    result = {
      'num_params': num_params,
      'num_steps': int(outcome.state.step),
      'num_tokens': outcome.num_tokens,
      'train_secs': outcome.train_secs,
      **{f'eval_{name}': x for name, x in outcome.eval_metrics.items()},
      'target': target.describe(),
      'data': dataset.statistics(),
      'config': dataclasses.asdict(config),
    }
    _finish(result, workdir=workdir)
  return outcome


def _finish(result: Mapping[str, Any], *, workdir: pathlib.Path) -> None:
  """Writes result.json and report.html, on the first process only."""
  if jax.process_index() != 0:
    return
  report.write_result(workdir, result)
  records = metrics.read_metrics(workdir, kind='train')
  x = [record['tokens'] for record in records]
  names = [name for name in records[-1] if name.startswith('acceptance_')]
  tiles, series = [], []
  for name in names:
    label = f'token {name.removeprefix("acceptance_")} of a draft'
    series.append(chart.Series(label, x, [record[name] for record in records]))
    if f'eval_{name}' in result:
      value = result[f'eval_{name}']
      tiles.append(
        sections.Tile(f'Accepted, {label}', value, note='validation')
      )
  curve = chart.Curve(
    'Acceptance', series, 'tokens', 'share of drafts accepted', from_zero=True
  )
  shown = [sections.KeyNumbers(tiles)] if tiles else []
  report.write_report(
    workdir,
    title='Drafter',
    sections=[*shown, curve, *report.training_sections(workdir)],
  )


class Saved(NamedTuple):
  """A trained drafter.

  Attributes:
    config: The target model it drafts for.
    params: Its parameters, numpy arrays.
    meta: 'target' (workdir, step, digest), 'tokenizer', 'config', 'model'.
  """

  config: transformer.TransformerConfig
  params: typing.Params
  meta: dict[str, Any]


def load(workdir: str | pathlib.Path) -> Saved:
  """Loads the newest whole checkpoint of a drafter's run.

  Args:
    workdir: Folder of a run of `train`.
  Raises:
    ValueError: If it holds no drafter.
  """
  workdir = pathlib.Path(workdir).absolute()
  meta = _saved_metadata(workdir)
  if meta is None:
    raise ValueError(
      f'{workdir} must be the folder of a drafter run and has no checkpoint; '
      'choose another.'
    )
  params = saved_run.restore_params(workdir / 'checkpoints', None)
  return Saved(transformer.TransformerConfig(**meta['model']), params, meta)


def is_run(workdir: str | pathlib.Path) -> bool:
  """Whether a folder is a drafter's run with a checkpoint."""
  checkpoints = pathlib.Path(workdir) / 'checkpoints'
  return bool(
    step_folders.steps(checkpoints)
  ) and 'target' in saved_run.read_metadata(checkpoints)


def _saved_metadata(workdir: pathlib.Path) -> dict[str, Any] | None:
  """What a drafter's run says of itself; None where nothing is saved yet."""
  checkpoints = workdir / 'checkpoints'
  if not step_folders.steps(checkpoints):
    return None
  metadata = saved_run.read_metadata(checkpoints)
  if 'target' not in metadata:
    raise ValueError(
      f'{workdir} must be the folder of a drafter run and holds another kind; '
      'choose another.'
    )
  return metadata


def _find_target(
  config: DrafterConfig, workdir: pathlib.Path
) -> target_run.TargetRun:
  """The target's newest checkpoint, or the one that the run began with."""
  if config.target is None:
    raise ValueError('--target is missing; name the folder of a training run.')
  metadata = _saved_metadata(workdir)
  if metadata is None:
    return target_run.find(config.target)
  known = metadata['target']
  there = step_folders.steps(pathlib.Path(config.target) / 'checkpoints')
  if known['step'] in there or hub.is_reference(config.target):
    target = target_run.find(config.target, step=known['step'])
    if target.digest == known['digest']:
      return target
  raise ValueError(
    f'--workdir={workdir} was trained for step {known["step"]} of '
    f'{known["workdir"]}, which --target={config.target} does not hold; name '
    'that target or a new workdir.'
  )


def _open_data(
  data: pipeline.DataConfig,
  target: target_run.TargetRun,
  workdir: pathlib.Path,
) -> tuple[dataset_lib.Dataset, dataset_lib.Dataset | None]:
  """Opens the text, and sees to it that its tokens are the target's."""
  cache = target.workdir / 'cache'
  dataset, validation = datasets.open_both(
    data, cache_dir=cache if cache.is_dir() else workdir / 'cache'
  )
  known = target.tokenizer
  if dataset.vocabulary.fingerprint != known['fingerprint']:
    raise ValueError(
      f"tokenizer={data.tokenizer!r} must be as it was in the target's run; "
      'give it the text it was made from.'
    )
  return dataset, validation


def _evaluate(
  validation: dataset_lib.Dataset,
  state: state_lib.TrainState,
  *,
  batch_loss: Callable[[typing.Params, typing.Batch], objectives.Loss],
  num_batches: int | None,
  process: tuple[int, int],
) -> dict[str, float]:
  """Means of the loss and its metrics over the validation split."""
  total = None
  batches = validation.iterate(process=process, repeat=False)
  with contextlib.closing(batches):
    for batch in itertools.islice(batches, num_batches):
      loss = batch_loss(state.params, batch)
      total = loss if total is None else jax.tree.map(jnp.add, total, loss)
  if total is None:
    raise ValueError('The validation split has no batch; add text to it.')
  total = jax.device_get(total)
  weight = max(float(total.weight), 1e-9)
  sums = {'loss': total.total, **total.metrics}
  return {name: float(value) / weight for name, value in sums.items()}


def _metadata(
  config: DrafterConfig, target: target_run.TargetRun
) -> Mapping[str, Any]:
  """What a reader of a checkpoint needs besides the arrays."""
  as_data = json.loads(
    strict_json.to_json(
      {
        'config': dataclasses.asdict(config),
        'model': dataclasses.asdict(target.model),
      }
    )
  )
  return {
    **as_data,
    'target': target.describe(),
    'tokenizer': dict(target.tokenizer),
  }
