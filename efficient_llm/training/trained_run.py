"""The model and the text of a run, for whatever begins with that model.

A checkpoint of transformers, named 'hf:DIR', stands for a run of step 0.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from efficient_llm import typing
from efficient_llm.data import pipeline
from efficient_llm.data import tokenizer as tokenizer_lib
from efficient_llm.models import transformer
from efficient_llm.models.huggingface import checkpoint as foreign
from efficient_llm.models.huggingface import hub
from efficient_llm.training import (
  manifest,
  processes,
  saved_run,
  step_folders,
)

# Where a run that was imported keeps its tokenizer.
CARRIED_FOLDER = 'huggingface'

_TOKENIZERS = ('tokenizer.json', 'tokenizer.model')
# As torch names them.
_DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """One checkpoint of a run.

  Attributes:
    workdir: Folder of the run.
    step: Of the checkpoint.
    digest: Hash of its arrays: the same for copies of it, else different.
    model: Its configuration.
    data: The text it was trained on.
    tokenizer: Name and fingerprint.
    origin: Of an imported model, its config.json and the dtype of its weights.
    imported: The checkpoint of transformers, where that is the run.
  """

  workdir: pathlib.Path
  step: int
  digest: str
  model: transformer.TransformerConfig
  data: pipeline.DataConfig
  tokenizer: Mapping[str, Any]
  origin: Mapping[str, Any] | None = None
  imported: foreign.Checkpoint | None = None

  @property
  def reference(self) -> str:
    """What `find` finds it by."""
    if self.imported is not None:
      return f'{hub.PREFIX}{self.workdir}'
    return str(self.workdir)

  @property
  def carried_folder(self) -> pathlib.Path | None:
    """Holds the tokenizer's files of an imported model."""
    if self.imported is not None:
      return self.workdir
    return None if self.origin is None else self.workdir / CARRIED_FOLDER

  @property
  def has_tokenizer(self) -> bool:
    """Whether there is one; a folder of transformers may hold none."""
    if self.model.reads_images:
      return False
    path = pathlib.Path(self.data.tokenizer)
    return self.origin is None or path.is_file()

  def restore_params(self, abstract_params: typing.PyTree) -> typing.Params:
    """Restores the parameters; see `saved_run.restore_params`."""
    if self.imported is not None:
      return self.imported.read(abstract_params)
    return saved_run.restore_params(
      self.workdir / 'checkpoints', abstract_params, step=self.step
    )

  def open_params(self) -> Callable[[str], Callable[[int | None], np.ndarray]]:
    """Opens the parameters one by one; see `saved_run.open_params`."""
    if self.imported is not None:
      return self.imported.open_param
    return saved_run.open_params(self.workdir / 'checkpoints', step=self.step)

  def load_tokenizer(self) -> tokenizer_lib.Tokenizer:
    """The run's own; one that was trained is in the run's cache."""
    if not self.data.tokenizer.startswith('bpe'):
      return tokenizer_lib.load(self.data.tokenizer)
    cache_dir = self.workdir / 'cache'
    return pipeline.open_dataset(self.data, cache_dir=cache_dir).tokenizer

  def describe(self) -> dict[str, Any]:
    """Says which checkpoint it is, as JSON can hold it."""
    return {
      'workdir': self.reference,
      'step': self.step,
      'digest': self.digest,
    }


def find(
  workdir: str | pathlib.Path, *, name: str, step: int | None = None
) -> TrainedRun:
  """Finds the newest whole checkpoint of a run.

  Args:
    workdir: Folder of a pre-training run, or 'hf:' and a folder or repository
      of transformers.
    name: What the user calls it, such as a flag.
    step: Take this one or fail.
  Raises:
    ValueError: If there is none.
  """
  if hub.is_reference(workdir):
    return _imported(str(workdir), step=step)
  workdir = pathlib.Path(workdir).absolute()
  checkpoints = workdir / 'checkpoints'
  if not checkpoints.is_dir():
    raise ValueError(
      f'{name}={workdir} must be the folder of a pre-training run and has no '
      'checkpoints; choose another.'
    )
  chosen = processes.on_first(
    lambda: step_folders.choose(checkpoints, step=step)[0],
    refusal=step_folders.CheckpointError,
  )
  if chosen is None:
    raise ValueError(
      f'{name}={workdir} must hold a checkpoint; wait for the first one.'
    )
  metadata = saved_run.read_metadata(checkpoints, step=chosen)
  try:
    model = transformer.TransformerConfig(**metadata['model'])
    data = pipeline.DataConfig(**_with_tuples(metadata['config']['data']))
    tokenizer = metadata['tokenizer']
    origin = metadata.get('huggingface')
    if origin is not None:
      path = workdir / CARRIED_FOLDER / data.tokenizer
      data = dataclasses.replace(data, tokenizer=str(path))
  except (KeyError, TypeError) as error:
    raise ValueError(
      f'{name}={workdir} must be a pre-training run of this version: '
      f'{" ".join(str(error).split())}; choose another.'
    ) from error
  return TrainedRun(
    workdir=workdir,
    step=chosen,
    digest=_digest(checkpoints / str(chosen)),
    model=model,
    data=data,
    tokenizer=tokenizer,
    origin=origin,
  )


def start_params(
  start: str,
  model: transformer.TransformerConfig,
  abstract_params: typing.PyTree,
) -> typing.Params:
  """Parameters that another run goes on from.

  Args:
    start: As the configuration names it; see `find`.
    model: Of the run that goes on.
    abstract_params: Shapes, dtypes and shardings to restore into.
  Raises:
    ValueError: If there are none, or they are of another model.
  """
  run = find(start, name='start')
  if run.model.sizes != model.sizes:
    raise ValueError(
      f'start={start!r} must be of the same model and has the sizes '
      f'{run.model.sizes}, not {model.sizes}; choose another.'
    )
  try:
    return run.restore_params(abstract_params)
  except (step_folders.CheckpointError, OSError) as error:
    raise ValueError(
      f'start={start!r} must be the folder of a run: {error}'
    ) from error


def _imported(reference: str, *, step: int | None) -> TrainedRun:
  """A checkpoint of transformers as a run, which was trained elsewhere."""
  if step:
    raise ValueError(
      f'{reference} must be taken at step 0, not {step}; leave the step out.'
    )
  opened = foreign.open_checkpoint(hub.folder(reference))
  found = [one for one in _TOKENIZERS if (opened.folder / one).is_file()]
  path = opened.folder / (found or _TOKENIZERS)[0]
  fingerprint = tokenizer_lib.load(str(path)).fingerprint if found else None
  model = opened.model
  if model.reads_images:
    data = pipeline.DataConfig(
      objective='classes',
      image_size=model.image_size,
      image_channels=model.image_channels,
    )
  else:
    data = pipeline.DataConfig(
      tokenizer=str(path),
      sequence_length=min(256, model.max_positions),
      objective='causal' if model.causal else 'masked',
    )
  return TrainedRun(
    workdir=opened.folder,
    step=0,
    digest=opened.digest,
    model=model,
    data=data,
    tokenizer={'name': str(path), 'fingerprint': fingerprint},
    origin={
      'document': dict(opened.document),
      'dtype': _DTYPES[opened.dtype],
    },
    imported=opened,
  )


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
  """JSON has lists where configurations have tuples."""
  return {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in values.items()
  }


def _digest(folder: pathlib.Path) -> str:
  arrays = {
    name: entry.sha256
    for name, entry in sorted(manifest.read(folder).files.items())
    if name.startswith(f'{step_folders.ARRAYS}/')
  }
  return hashlib.blake2b(
    json.dumps(arrays).encode(), digest_size=16
  ).hexdigest()
