"""Runs made of checkpoints of others, and checkpoints for others made of runs.

A run that was imported holds, beside its checkpoint of step 0:

    huggingface/    the tokenizer's files, as they were
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

from efficient_llm import sharding
from efficient_llm.models import transformer
from efficient_llm.models.huggingface import export, families, hub, shards
from efficient_llm.training import (
  checkpoint,
  step_folders,
  strict_json,
  trained_run,
)
from efficient_llm.training import state as state_lib

# What belongs to a tokenizer, or to how text is drawn.
_CARRIED = (
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'vocab.txt',
  'merges.txt',
  'chat_template.jinja',
  'generation_config.json',
)


def import_run(
  reference: str,
  workdir: str | pathlib.Path,
  *,
  mesh: sharding.MeshConfig | None = None,
) -> trained_run.TrainedRun:
  """Makes a run of a checkpoint; every device reads its own slices.

  Args:
    reference: 'hf:DIR' or 'hf:OWNER/NAME'.
    workdir: Folder of the run, new.
    mesh: How devices are laid out; all share the parameters by default.
  Raises:
    ValueError: If the checkpoint will not do, or the folder holds a run.
  """
  workdir = pathlib.Path(workdir).absolute()
  if step_folders.steps(workdir / 'checkpoints'):
    raise ValueError(
      f'--to={workdir} must be new and holds a run; choose another.'
    )
  run = trained_run.find(reference, name='--from')
  params = read_sharded(run, mesh or sharding.MeshConfig())
  folder = workdir / trained_run.CARRIED_FOLDER
  _carry(hub.folder(reference), folder)
  data = dataclasses.replace(
    run.data, tokenizer=pathlib.Path(run.data.tokenizer).name
  )
  metadata = {
    'config': {'data': dataclasses.asdict(data)},
    'model': dataclasses.asdict(run.model),
    'tokenizer': dict(run.tokenizer),
    'huggingface': run.origin,
  }
  saver = checkpoint.Checkpointer(
    workdir / 'checkpoints', checkpoint.CheckpointConfig(asynchronous=False)
  )
  saver.save(
    0,
    {'params': params},
    data_state=None,
    metadata=json.loads(strict_json.to_json(metadata)),
  )
  saver.close()
  return trained_run.find(workdir, name='--to')


def read_sharded(
  run: trained_run.TrainedRun, config: sharding.MeshConfig
) -> Any:
  """A run's parameters, each device holding its own slices.

  Args:
    run: Imported or not.
    config: How devices are laid out.
  """
  mesh = sharding.make_mesh(config)
  shapes = transformer.abstract_params(run.model)
  placed = sharding.param_shardings(
    mesh, transformer.logical_axes(run.model), shapes
  )
  return run.restore_params(state_lib.abstract(shapes, placed))


def export_run(
  run: trained_run.TrainedRun,
  folder: str | pathlib.Path,
  *,
  family: str | None = None,
  dtype: export.Dtype | None = None,
  max_shard_bytes: int = shards.MAX_SHARD_BYTES,
) -> None:
  """Writes the model and the tokenizer of a run for transformers.

  Parameters are read one after the other, with all of their layers.

  Args:
    run: The run.
    folder: New.
    family: Name of its family; by default the one that has such models.
    dtype: Of the weights; that of the import, else float32, by default.
    max_shard_bytes: Of one file's tensors.
  Raises:
    ValueError: If no family has such a model, or the folder holds one.
  """
  folder = pathlib.Path(folder).absolute()
  export.check_folder(folder)
  origin = run.origin or {}
  document = origin.get('document')
  chosen = families.choose(run.model, name=family)
  if document is None or families.kind_of(document) != chosen:
    document = _special_tokens(run)
  export.write(
    folder,
    run.model,
    run.open_params(),
    family=family,
    dtype=dtype or origin.get('dtype', 'float32'),
    document=document,
    max_shard_bytes=max_shard_bytes,
  )
  if not _carry(run.carried_folder, folder) and run.has_tokenizer:
    for name, content in run.load_tokenizer().files().items():
      (folder / name).write_bytes(content)


def _special_tokens(run: trained_run.TrainedRun) -> dict[str, Any]:
  """Numbers that the families have defaults for, which are other models'."""
  if run.model.reads_images:
    return {}
  tokenizer = run.load_tokenizer() if run.has_tokenizer else None
  return {
    f'{name}_token_id': getattr(tokenizer, f'{name}_id', None)
    for name in ('bos', 'eos', 'pad')
  }


def _carry(source: pathlib.Path | None, target: pathlib.Path) -> bool:
  """Copies a tokenizer's files; whether there are any."""
  if source is None:
    return False
  found = [name for name in _CARRIED if (source / name).is_file()]
  target.mkdir(parents=True, exist_ok=True)
  for name in found:
    shutil.copyfile(source / name, target / name)
  return any(name.startswith('tokenizer.') for name in found)
