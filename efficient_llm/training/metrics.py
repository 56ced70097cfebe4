"""Metrics of a run: metrics.jsonl is the truth, everything else a mirror.

One JSON object per line: kind, step, time (seconds since 1970) and numbers.
The file is strict JSON, so values that are not finite stand in it as the
strings 'nan', 'inf' and '-inf'; `read_metrics` gives them back as floats.
"""

import importlib
import json
import os
import pathlib
import time
import uuid
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import tensorboardX

from efficient_llm.training import strict_json

FILE_NAME = 'metrics.jsonl'
_RESERVED = frozenset({'kind', 'step', 'time'})
_NON_FINITE = {text: float(text) for text in ('nan', 'inf', '-inf')}


class MetricWriter:
  """Appends metrics to `workdir`/metrics.jsonl and mirrors them.

  Opening an existing file continues it, without its half-written last line if
  the writer before was killed. Call `rewind` when training goes back to a
  checkpoint.

  Args:
    workdir: Folder of the run; made if it does not exist.
    tensorboard: Whether to write `workdir`/tensorboard too.
    wandb_project: Weights & Biases project to mirror to; None for none.
    primary: False writes nothing, for all processes but the first.
    config: The resolved configuration, stored with the W&B run.

  Raises:
    ValueError: If W&B is asked for and not installed.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    tensorboard: bool = True,
    wandb_project: str | None = None,
    primary: bool = True,
    config: Mapping[str, Any] | None = None,
  ):
    self._workdir = pathlib.Path(workdir)
    self._path = self._workdir / FILE_NAME
    self._primary = primary
    self._with_tensorboard = tensorboard
    self._tensorboard: tensorboardX.SummaryWriter | None = None
    self._purge_step: int | None = None
    self._wandb_run: Any = None
    if not primary:
      return
    self._workdir.mkdir(parents=True, exist_ok=True)
    if wandb_project is not None:
      self._wandb_run = _start_wandb(wandb_project, self._workdir, config)
    _drop_half_line(self._path)
    self._file = self._path.open('a', encoding='utf-8')

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def write(
    self, step: int, values: Mapping[str, float], *, kind: str = 'train'
  ) -> None:
    """Appends one line and hands it to the system before returning.

    Args:
      step: Training step the values belong to.
      values: Numbers by name; scalars of numpy and jax count as numbers.
      kind: What they describe, such as 'train' or 'eval'.

    Raises:
      ValueError: If a name is reserved or a value is not one number.
    """
    if not self._primary:
      return
    numbers = {name: _number(name, value) for name, value in values.items()}
    clash = sorted(_RESERVED & numbers.keys())
    if clash:
      raise ValueError(
        f'A metric must not be named {clash[0]!r}: every line has that field; '
        'rename it.'
      )
    line = {'kind': kind, 'step': int(step), 'time': round(time.time(), 3)}
    self._file.write(strict_json.to_json({**line, **numbers}) + '\n')
    self._file.flush()
    self._mirror(int(step), numbers, kind)

  def rewind(self, step: int) -> None:
    """Drops every line after `step`, from which training now continues.

    The file is replaced in one piece, so a crash leaves the old or the new
    one. TensorBoard is told to hide the later points.

    Args:
      step: The step of the restored checkpoint; its own lines stay.
    """
    if not self._primary:
      return
    kept = [
      line for line, record in _records(self._path) if record['step'] <= step
    ]
    self._file.close()
    strict_json.write_atomically(self._path, ''.join(kept))
    self._file = self._path.open('a', encoding='utf-8')
    self._close_tensorboard()
    self._purge_step = step + 1

  def close(self) -> None:
    """Flushes and closes everything; the writer is then done."""
    if not self._primary:
      return
    self._file.close()
    self._close_tensorboard()
    if self._wandb_run is not None:
      self._wandb_run.finish()

  def _mirror(self, step: int, numbers: Mapping[str, float], kind: str) -> None:
    if self._with_tensorboard:
      tensorboard = self._open_tensorboard()
      for name, number in numbers.items():
        tensorboard.add_scalar(f'{kind}/{name}', number, step)
    if self._wandb_run is not None:
      named = {f'{kind}/{name}': number for name, number in numbers.items()}
      self._wandb_run.log({**named, 'step': step})

  def _open_tensorboard(self) -> tensorboardX.SummaryWriter:
    if self._tensorboard is None:
      self._tensorboard = tensorboardX.SummaryWriter(
        str(self._workdir / 'tensorboard'),
        purge_step=self._purge_step,
        flush_secs=10,
        # Two writers may start within the second that the name tells apart.
        filename_suffix=f'.{uuid.uuid4().hex[:8]}',
      )
    return self._tensorboard

  def _close_tensorboard(self) -> None:
    if self._tensorboard is not None:
      self._tensorboard.close()
      self._tensorboard = None


def read_metrics(
  path: str | os.PathLike[str], *, kind: str | None = None
) -> list[dict[str, Any]]:
  """Reads a metrics file, also one that is being written.

  Args:
    path: The file, or the folder of the run.
    kind: Keep only lines of this kind; None keeps all.

  Returns:
    One dict per line, in the order written. A half-written last line is left
    out.

  Raises:
    FileNotFoundError: If there is no such file.
    ValueError: If a complete line is not a JSON object with kind and step.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = path / FILE_NAME
  return [
    {
      name: value if name in _RESERVED else _NON_FINITE.get(value, value)
      for name, value in record.items()
    }
    for _, record in _records(path)
    if kind is None or record['kind'] == kind
  ]


def _records(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  """Reads the complete lines, as text and parsed."""
  content = path.read_bytes()
  # What follows the last newline is half-written.
  lines = content[: content.rfind(b'\n') + 1].splitlines(keepends=True)
  return [
    (line.decode(), _parse(line, f'{path} line {number}'))
    for number, line in enumerate(lines, start=1)
  ]


def _parse(line: bytes, where: str) -> dict[str, Any]:
  try:
    record = json.loads(line)
  except ValueError:
    record = None
  if isinstance(record, dict) and {'kind', 'step'} <= record.keys():
    return record
  raise ValueError(
    f'{where} must be a JSON object with kind and step, is '
    f'{line[:40]!r}; remove that line.'
  )


def _drop_half_line(path: pathlib.Path) -> None:
  """Cuts off what a killed writer left, before the next line joins it."""
  if not path.exists():
    return
  with path.open('r+b') as file:
    file.truncate(file.read().rfind(b'\n') + 1)


def _number(name: str, value: Any) -> int | float:
  array = np.asarray(value)
  if array.size != 1 or not strict_json.is_numeric(array):
    raise ValueError(
      f'Metric {name!r} must be one number, is {value!r:.60}; reduce it first.'
    )
  number = array.reshape(()).astype(object).item()
  return number if isinstance(number, int) else float(number)


def _start_wandb(
  project: str, workdir: pathlib.Path, config: Mapping[str, Any] | None
) -> Any:
  """Starts or continues the W&B run of this folder."""
  try:
    wandb = importlib.import_module('wandb')
  except ImportError as error:
    raise ValueError(
      f'wandb_project={project!r} needs the package wandb, which is not '
      "installed; pip install 'efficient_llm[wandb]' or leave it unset."
    ) from error
  id_path = workdir / 'wandb_run_id'
  if not id_path.exists():
    strict_json.write_atomically(id_path, uuid.uuid4().hex[:8])
  run = wandb.init(
    project=project,
    id=id_path.read_text(encoding='utf-8'),
    resume='allow',
    dir=str(workdir),
    config=None if config is None else dict(config),
  )
  # W&B refuses a step that goes back, as after a rewind; as a field it may.
  run.define_metric('*', step_metric='step')
  return run
