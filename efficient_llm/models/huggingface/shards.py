"""The safetensors files of a folder as one table of tensors, in and out."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from efficient_llm.models.huggingface import safetensors_file

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
# As transformers writes them.
MAX_SHARD_BYTES = 5_000_000_000

_MAX_JSON_BYTES = 50_000_000


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor is."""

  path: pathlib.Path
  entry: safetensors_file.Entry

  @property
  def shape(self) -> tuple[int, ...]:
    return self.entry.shape

  @property
  def dtype(self) -> str:
    return self.entry.dtype

  def without_ones(self, num_ones: int) -> 'Tensor':
    """The same bytes, seen without so many axes of length one in front."""
    entry = dataclasses.replace(self.entry, shape=self.shape[num_ones:])
    return Tensor(self.path, entry)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Rows from `start` to before `stop`, as they are stored."""
    return safetensors_file.read_rows(self.path, self.entry, start, stop)


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
  """Finds all tensors of a checkpoint; reads headers alone.

  Args:
    folder: Holds model.safetensors, or several files and their index.
  Raises:
    ValueError: If files are missing or not whole, or the index is not theirs.
  """
  index = folder / INDEX
  if not index.is_file():
    path = folder / SINGLE
    if not path.is_file():
      raise ValueError(_nothing_there(folder))
    entries = safetensors_file.read_header(path).entries
    return {name: Tensor(path, entry) for name, entry in entries.items()}
  by_name = _read_index(index)
  tensors: dict[str, Tensor] = {}
  for file in sorted(set(by_name.values())):
    entries = safetensors_file.read_header(folder / file).entries
    listed = {name for name, other in by_name.items() if other == file}
    if wrong := sorted(set(entries) ^ listed):
      where = 'index alone' if wrong[0] in listed else 'file alone'
      raise ValueError(
        f'{index} must list the tensors of {file}; '
        f'{safetensors_file.spell(wrong[0])} is in the {where}; fetch the '
        'checkpoint again.'
      )
    tensors |= {
      name: Tensor(folder / file, entry) for name, entry in entries.items()
    }
  return tensors


def files(tensors: Mapping[str, Tensor]) -> list[pathlib.Path]:
  """The files that hold the tensors."""
  return sorted({tensor.path for tensor in tensors.values()})


def _nothing_there(folder: pathlib.Path) -> str:
  pickles = sorted(path.name for path in folder.glob('*.bin'))
  if pickles:
    return (
      f'{folder} must hold {SINGLE}, holds {pickles[0]}, a pickle, which could '
      'run any code; save it with safe_serialization first.'
    )
  return f'{folder} must hold {SINGLE} or {INDEX}; choose another.'


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads an object from a JSON file of bounded size.

  Raises:
    ValueError: If it is missing, too long, or holds anything else.
  """
  try:
    if not path.is_file():
      raise ValueError('it is no file')
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
      raise ValueError(f'it has {size} bytes')
    document = json.loads(path.read_bytes().decode())
  except (OSError, ValueError, RecursionError) as error:
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise ValueError(
      f'{path} must be readable JSON of at most {_MAX_JSON_BYTES} bytes: '
      f'{reason[:200]}; fetch it again.'
    ) from error
  if not isinstance(document, dict):
    raise ValueError(f'{path} must hold a JSON object; fetch it again.')
  return document


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """File by tensor; all files are plain names of this folder."""
  by_name = read_json(path).get('weight_map')
  if not isinstance(by_name, dict) or not by_name:
    raise ValueError(f'{path} must hold a weight_map; fetch it again.')
  for name, file in by_name.items():
    if (
      not isinstance(file, str)
      or not file.endswith('.safetensors')
      or not file.isprintable()
      or pathlib.PurePath(file).name != file
      or '\\' in file
    ):
      raise ValueError(
        f'{path} must name .safetensors files of its own folder, names '
        f'{safetensors_file.spell(file)} for {safetensors_file.spell(name)}; '
        'fetch it again.'
      )
  return by_name


def write_folder(
  folder: pathlib.Path,
  tensors: Mapping[str, tuple[str, Sequence[int]]],
  make: Callable[[str], np.ndarray],
  *,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[pathlib.Path]:
  """Writes tensors as one file, or as several with an index.

  Args:
    folder: Where to; it is there and holds no such files.
    tensors: Dtype and shape by name, in the order they are to stand.
    make: Name -> the tensor.
    max_shard_bytes: Of a file's tensors; one bigger tensor has its own file.
  Returns:
    The files of tensors.
  """
  parts: list[dict[str, tuple[str, Sequence[int]]]] = [{}]
  total = filled = 0
  for name, (dtype, shape) in tensors.items():
    item = safetensors_file.WEIGHT_DTYPES[dtype].itemsize
    num_bytes = math.prod(shape) * item
    if parts[-1] and filled + num_bytes > max_shard_bytes:
      parts.append({})
      filled = 0
    parts[-1][name] = (dtype, shape)
    filled += num_bytes
    total += num_bytes
  names = [SINGLE]
  if len(parts) > 1:
    names = [
      f'model-{number:05}-of-{len(parts):05}.safetensors'
      for number in range(1, len(parts) + 1)
    ]
  # transformers wants to know what wrote it.
  metadata = {'format': 'pt'}
  for file, part in zip(names, parts, strict=True):
    safetensors_file.write(folder / file, part, make, metadata=metadata)
  if len(parts) > 1:
    weight_map = {
      name: file
      for file, part in zip(names, parts, strict=True)
      for name in part
    }
    document = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    text = json.dumps(document, indent=1, sort_keys=True) + '\n'
    (folder / INDEX).write_text(text, encoding='utf-8')
  return [folder / file for file in names]
