"""One safetensors file: eight bytes of length, a JSON header, the tensors.

The header says where each tensor stands. It is bounded before it is trusted:
nothing is read or allocated because of a number in it that the file's size
does not bear out, and nothing in the file is executed.

Source: the format's description, github.com/huggingface/safetensors.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

# A header of 100,000 tensors has about half as many.
MAX_HEADER_BYTES = 25_000_000
METADATA = '__metadata__'

_LENGTH = struct.Struct('<Q')
_MAX_DIMENSIONS = 16
# What a header may name; those of less than a byte it may not.
_ITEM_BYTES = {
  'BOOL': 1,
  'U8': 1,
  'I8': 1,
  'F8_E4M3': 1,
  'F8_E5M2': 1,
  'F8_E8M0': 1,
  'I16': 2,
  'U16': 2,
  'F16': 2,
  'BF16': 2,
  'I32': 4,
  'U32': 4,
  'F32': 4,
  'I64': 8,
  'U64': 8,
  'F64': 8,
  'C64': 8,
}
# What weights may be; all of them widen to float32 without loss.
WEIGHT_DTYPES: Mapping[str, np.dtype] = {
  'F32': np.dtype('<f4'),
  'F16': np.dtype('<f2'),
  'BF16': jnp.dtype(jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a file.

  Attributes:
    dtype: As the format spells it, such as 'BF16'.
    shape: Of the tensor, row-major.
    start: Of its bytes, counted from the beginning of the file.
    num_bytes: How many they are.
  """

  dtype: str
  shape: tuple[int, ...]
  start: int
  num_bytes: int


@dataclasses.dataclass(frozen=True)
class Header:
  """What a file holds, by name, in the order of its bytes."""

  entries: Mapping[str, Entry]
  metadata: Mapping[str, str]


def read_header(path: pathlib.Path) -> Header:
  """Reads and checks a header.

  Args:
    path: The file.
  Raises:
    ValueError: If the file is not a whole safetensors file; in one line.
  """
  try:
    # Else a pipe would be waited for.
    if not path.is_file():
      raise _refusal(path, 'be a file and is none')
    with path.open('rb') as file:
      size = os.fstat(file.fileno()).st_size
      return _parse(path, file.read(_LENGTH.size), size, file.read)
  except OSError as error:
    raise _refusal(path, f'be readable: {error.strerror}') from error


def _parse(
  path: pathlib.Path, prefix: bytes, size: int, read: Callable[[int], bytes]
) -> Header:
  if len(prefix) < _LENGTH.size:
    raise _refusal(path, f'have 8 bytes before its header, has {len(prefix)}')
  (length,) = _LENGTH.unpack(prefix)
  most = min(size - _LENGTH.size, MAX_HEADER_BYTES)
  if not 2 <= length <= most:
    raise _refusal(path, f'have a header of 2 to {most} bytes, says {length}')
  text = read(length)
  if len(text) < length:
    raise _refusal(path, f'have a header of {length} bytes, has {len(text)}')
  try:
    document = json.loads(
      text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant
    )
  # A number of too many digits is a ValueError too, deep nesting is not.
  except (ValueError, RecursionError) as error:
    reason = ' '.join(str(error).split())[:100]
    raise _refusal(path, f'have a header of strict JSON: {reason}') from error
  if not isinstance(document, dict):
    raise _refusal(path, 'have a JSON object as its header')
  metadata = document.pop(METADATA, {})
  if not isinstance(metadata, dict) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise _refusal(path, f'have texts by name as its {METADATA}')
  return Header(_entries(path, document, length, size), metadata)


def _entries(
  path: pathlib.Path, document: Mapping[str, Any], length: int, size: int
) -> dict[str, Entry]:
  """The tensors in the order of their bytes, which they share out whole."""
  begin = _LENGTH.size + length
  found = {
    name: _entry(path, name, value, begin, size)
    for name, value in document.items()
  }
  ordered = sorted(
    found.items(), key=lambda item: (item[1].start, item[1].num_bytes)
  )
  end = begin
  for name, entry in ordered:
    if entry.start != end:
      raise _refusal(
        path,
        f'have {spell(name)} begin at byte {end - begin} of its data, where '
        f'the tensor before it ends, says {entry.start - begin}',
      )
    end += entry.num_bytes
  if end != size:
    raise _refusal(path, f'be {end} bytes long, as its header says, is {size}')
  return dict(ordered)


def _entry(
  path: pathlib.Path, name: str, value: Any, begin: int, size: int
) -> Entry:
  """One tensor; its numbers are small once this returns."""
  wanted = {'dtype', 'shape', 'data_offsets'}
  if not isinstance(value, dict) or set(value) != wanted:
    raise _refusal(
      path, f'say dtype, shape and data_offsets of {spell(name)}, alone'
    )
  dtype, shape, offsets = (
    value[key] for key in ('dtype', 'shape', 'data_offsets')
  )
  if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
    raise _refusal(
      path,
      f'give {spell(name)} a dtype of {", ".join(_ITEM_BYTES)}, says '
      f'{spell(dtype)}',
    )
  if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
    raise _refusal(path, f'give {spell(name)} a shape, says {spell(shape)}')
  if not _are_counts(offsets) or len(offsets) != 2:
    raise _refusal(
      path, f'give {spell(name)} two data_offsets, says {spell(offsets)}'
    )
  start, stop = offsets
  if not start <= stop <= size - begin:
    raise _refusal(
      path,
      f'keep {spell(name)} within its {size - begin} bytes of data, says '
      f'{spell(offsets)}',
    )
  num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
  if stop - start != num_bytes:
    raise _refusal(
      path,
      f'give {spell(name)}, {dtype} {spell(shape)}, {spell(num_bytes)} bytes, '
      f'gives it {stop - start}',
    )
  return Entry(dtype, tuple(shape), begin + start, num_bytes)


def _are_counts(values: Any) -> bool:
  return isinstance(values, list) and all(
    type(value) is int and value >= 0 for value in values
  )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError('a key stands twice')
  return found


def _no_constant(text: str) -> None:
  raise ValueError(f'{text} is no JSON')


def spell(value: Any) -> str:
  """A name or a value as part of a line: short, and ASCII alone."""
  try:
    text = ascii(value)
  except ValueError:  # Of more digits than Python will spell.
    return 'a number of thousands of digits'
  return text if len(text) <= 100 else f'{text[:100]}...'


def _refusal(path: pathlib.Path, rule: str) -> ValueError:
  return ValueError(
    f'{spell(str(path))[1:-1]} must {rule}; fetch the file again.'
  )


def read_rows(
  path: pathlib.Path, entry: Entry, start: int, stop: int
) -> np.ndarray:
  """Reads a range of a tensor's first axis, and nothing else of the file.

  Args:
    path: The file.
    entry: The tensor, of one of `WEIGHT_DTYPES`.
    start: First row.
    stop: Behind the last one.
  Raises:
    ValueError: If the file ends before the tensor does.
  """
  dtype = WEIGHT_DTYPES[entry.dtype]
  shape = (stop - start, *entry.shape[1:])
  row_bytes = math.prod(entry.shape[1:]) * dtype.itemsize
  rows = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
  view, done = rows.data, 0
  with path.open('rb', buffering=0) as file:
    file.seek(entry.start + start * row_bytes)
    while done < len(view):
      # The system reads at most 2 GiB at once.
      count = file.readinto(view[done : done + (1 << 30)])
      if not count:
        raise _refusal(path, 'be as long as when it was opened')
      done += count
  return rows.view(dtype).reshape(shape)


def write(
  path: pathlib.Path,
  tensors: Mapping[str, tuple[str, Sequence[int]]],
  make: Callable[[str], np.ndarray],
  *,
  metadata: Mapping[str, str],
) -> None:
  """Writes a file, one tensor in memory at a time.

  Args:
    path: The file; one that is there is replaced when all is written.
    tensors: Dtype and shape by name.
    make: Name -> the tensor.
    metadata: Texts that go into the header.
  """
  header: dict[str, Any] = {METADATA: dict(metadata)}
  end = 0
  for name, (dtype, shape) in tensors.items():
    start, end = end, end + math.prod(shape) * _ITEM_BYTES[dtype]
    header[name] = {
      'dtype': dtype,
      'shape': list(shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  # So that the tensors begin at a multiple of eight.
  text += b' ' * (-len(text) % 8)
  partial = path.with_name(f'.{path.name}.tmp')
  try:
    with partial.open('wb') as file:
      file.write(_LENGTH.pack(len(text)) + text)
      for name, (dtype, shape) in tensors.items():
        array = np.ascontiguousarray(make(name), WEIGHT_DTYPES[dtype])
        if array.shape != tuple(shape):
          raise ValueError(
            f'{name} must be {tuple(shape)}, is {array.shape}; mend its rule.'
          )
        file.write(array.reshape(-1).view(np.uint8).data)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)
