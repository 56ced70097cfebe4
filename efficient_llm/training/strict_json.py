"""Strict JSON from Python, numpy and jax values, and files that never tear."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def to_json(value: Any, *, indent: int | None = None) -> str:
  """Writes strict JSON: no NaN or Infinity, which parsers may refuse.

  Takes what results and configurations are made of: mappings, sequences,
  dataclasses, paths, numbers and arrays of Python, numpy and jax.

  Raises:
    ValueError: If a part is of another type.
  """
  return json.dumps(_plain(value, 'value'), indent=indent, allow_nan=False)


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Replaces a file so that a crash leaves the old content or the new."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    # A sample of a byte model may hold what UTF-8 cannot.
    with temporary.open('w', encoding='utf-8', errors='replace') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def is_numeric(array: np.ndarray) -> bool:
  """Says whether an array holds whole or real numbers, bfloat16 too."""
  # bfloat16 is no numpy kind of its own; it casts safely to float64.
  return array.dtype.kind in 'iub' or np.can_cast(array.dtype, np.float64)


def _plain(value: Any, name: str) -> Any:
  """Turns `value` into what json.dumps writes as strict JSON."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = {
      field.name: getattr(value, field.name)
      for field in dataclasses.fields(value)
    }
  if isinstance(value, Mapping):
    return {
      str(key): _plain(part, f'{name}.{key}') for key, part in value.items()
    }
  if isinstance(value, (list, tuple)):
    return [_plain(part, f'{name}[{i}]') for i, part in enumerate(value)]
  if isinstance(value, float) and not math.isfinite(value):
    return str(float(value))
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if hasattr(value, '__array__') and is_numeric(np.asarray(value)):
    array = np.asarray(value)
    exact = array if array.dtype.kind in 'iub' else array.astype(np.float64)
    return _plain(exact.tolist(), name)
  raise ValueError(
    f'{name} must be a number, text, None, list or mapping to be stored, is '
    f'{type(value).__name__}; convert it first.'
  )
