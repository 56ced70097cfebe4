"""The model and the text of a run, for whatever begins with that model."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from efficient_llm import typing
from efficient_llm.data import pipeline
from efficient_llm.data import tokenizer as tokenizer_lib
from efficient_llm.models import transformer
from efficient_llm.training import (
  manifest,
  processes,
  saved_run,
  step_folders,
)


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
  """

  workdir: pathlib.Path
  step: int
  digest: str
  model: transformer.TransformerConfig
  data: pipeline.DataConfig
  tokenizer: Mapping[str, Any]

  def restore_params(self, abstract_params: typing.PyTree) -> typing.Params:
    """Restores the parameters; see `saved_run.restore_params`."""
    return saved_run.restore_params(
      self.workdir / 'checkpoints', abstract_params, step=self.step
    )

  def load_tokenizer(self) -> tokenizer_lib.Tokenizer:
    """The run's own; one that was trained is in the run's cache."""
    if not self.data.tokenizer.startswith('bpe'):
      return tokenizer_lib.load(self.data.tokenizer)
    cache_dir = self.workdir / 'cache'
    return pipeline.open_dataset(self.data, cache_dir=cache_dir).tokenizer

  def describe(self) -> dict[str, Any]:
    """Says which checkpoint it is, as JSON can hold it."""
    return {
      'workdir': str(self.workdir),
      'step': self.step,
      'digest': self.digest,
    }


def find(
  workdir: str | pathlib.Path, *, name: str, step: int | None = None
) -> TrainedRun:
  """Finds the newest whole checkpoint of a run.

  Args:
    workdir: Folder of a pre-training run.
    name: What the user calls it, such as a flag.
    step: Take this one or fail.
  Raises:
    ValueError: If there is none.
  """
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
