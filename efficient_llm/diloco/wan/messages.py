"""What hub and islands say to each other, as bytes, and what is refused.

A frame is a header in JSON and the arrays it names, one after the other:

    'ISL1' | header's length, 4 bytes, little-endian | header | arrays

Nothing in it is run or trusted: its size, its types and its shapes are checked
before anything is made of them.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from efficient_llm.training import strict_json

_MAGIC = b'ISL1'
_MAX_HEADER_BYTES = 1 << 20
_MAX_ARRAYS = 1 << 16
_MAX_DIMENSIONS = 8
_MAX_DEPTH = 8
_DTYPES = ('float32', 'float16', 'int8', 'uint8', 'uint16')


class MessageError(ValueError):
  """A message that is not one, in one line."""


@dataclasses.dataclass(frozen=True)
class Message:
  """What is said.

  Attributes:
    kind: What it is about.
    fields: What JSON can hold.
    arrays: By name.
  """

  kind: str
  fields: Mapping[str, Any]
  arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def integer(self, name: str, *, low: int = 0, high: int = 1 << 53) -> int:
    """A field that must be a whole number in [low, high].

    Raises:
      MessageError: If it is not.
    """
    value = self.fields.get(name)
    if type(value) is not int or not low <= value <= high:
      raise MessageError(
        f'{name}={_shown(value)} must be a whole number in [{low}, {high}].'
      )
    return value

  def number(self, name: str) -> float:
    """A field that must be a finite number, 0 or more.

    Raises:
      MessageError: If it is not.
    """
    value = self.fields.get(name)
    # Compared first: a whole number may be too long for a float.
    if (
      isinstance(value, bool)
      or not isinstance(value, int | float)
      or not 0 <= value < 1e18
    ):
      raise MessageError(f'{name}={_shown(value)} must be a number from 0 on.')
    return float(value)

  def text(self, name: str) -> str:
    """A field that must be text of at most 200 characters.

    Raises:
      MessageError: If it is not.
    """
    value = self.fields.get(name)
    if not isinstance(value, str) or len(value) > 200:
      raise MessageError(
        f'{name}={_shown(value)} must be text of at most 200 characters.'
      )
    return value

  def integers(self, name: str, count: int) -> list[int]:
    """A field that must be a list of `count` whole numbers from 0 on.

    Raises:
      MessageError: If it is not.
    """
    value = self.fields.get(name)
    if (
      not isinstance(value, list)
      or len(value) != count
      or not all(type(x) is int and 0 <= x < 1 << 53 for x in value)
    ):
      raise MessageError(
        f'{name}={_shown(value)} must be {count} whole numbers from 0 on.'
      )
    return value

  def texts(self, name: str, count: int) -> list[str]:
    """A field that must be a list of `count` texts.

    Raises:
      MessageError: If it is not.
    """
    value = self.fields.get(name)
    if (
      not isinstance(value, list)
      or len(value) != count
      or not all(isinstance(x, str) and len(x) <= 200 for x in value)
    ):
      raise MessageError(f'{name}={_shown(value)} must be {count} texts.')
    return value


def encode(message: Message) -> bytes:
  """The frame of a message."""
  arrays = [
    (name, np.ascontiguousarray(x)) for name, x in message.arrays.items()
  ]
  header = strict_json.to_json(
    {
      'kind': message.kind,
      'fields': message.fields,
      'arrays': [[name, x.dtype.name, list(x.shape)] for name, x in arrays],
    }
  ).encode()
  return b''.join(
    [
      _MAGIC,
      len(header).to_bytes(4, 'little'),
      header,
      *(x.tobytes() for _, x in arrays),
    ]
  )


def decode(frame: bytes, *, max_bytes: int) -> Message:
  """The message of a frame; its arrays are views of the frame.

  Args:
    frame: What came.
    max_bytes: More is not looked at.

  Raises:
    MessageError: If it is not a whole message, in one line.
  """
  if len(frame) > max_bytes:
    raise MessageError(
      f'a message of {len(frame)} bytes must not exceed {max_bytes}.'
    )
  start = len(_MAGIC) + 4
  if len(frame) < start or frame[: len(_MAGIC)] != _MAGIC:
    raise MessageError('a message must begin with ISL1 and a length.')
  length = int.from_bytes(frame[len(_MAGIC) : start], 'little')
  if length > min(_MAX_HEADER_BYTES, len(frame) - start):
    raise MessageError(
      f'a header of {length} bytes must not exceed the message or '
      f'{_MAX_HEADER_BYTES}.'
    )
  header = _parse(frame[start : start + length])
  arrays, end = {}, start + length
  for name, dtype, shape in header['arrays']:
    count = math.prod(shape)
    size = count * np.dtype(dtype).itemsize
    if size > len(frame) - end:
      raise MessageError(
        f'array {_shown(name)} must have {size} bytes, the message ends after '
        f'{len(frame) - end}.'
      )
    values = np.frombuffer(frame, dtype, count, end)
    try:
      arrays[name] = values.reshape(shape)
    except ValueError as error:
      # Of no elements, and with a dimension that is too long for numpy.
      raise MessageError(f'shape {_shown(shape)} must be possible.') from error
    end += size
  if end != len(frame):
    raise MessageError(
      f'a message must end with its last array, {len(frame) - end} bytes '
      'follow.'
    )
  return Message(header['kind'], header['fields'], arrays)


def _parse(text: bytes) -> dict[str, Any]:
  """The header, checked for everything but what its fields mean."""
  try:
    header = json.loads(text, parse_constant=_refuse_constant)
  except (ValueError, RecursionError) as error:
    raise MessageError('a header must be JSON.') from error
  if not isinstance(header, dict) or set(header) != {
    'kind',
    'fields',
    'arrays',
  }:
    raise MessageError('a header must have kind, fields and arrays.')
  kind, fields, arrays = header['kind'], header['fields'], header['arrays']
  if not isinstance(kind, str) or not isinstance(fields, dict):
    raise MessageError('kind must be text and fields a mapping.')
  if _depth(fields) > _MAX_DEPTH:
    raise MessageError(f'fields must not nest deeper than {_MAX_DEPTH}.')
  if not isinstance(arrays, list) or len(arrays) > _MAX_ARRAYS:
    raise MessageError(f'arrays must be a list of at most {_MAX_ARRAYS}.')
  names = set()
  for entry in arrays:
    _check_array(entry)
    names.add(entry[0])
  if len(names) != len(arrays):
    raise MessageError('arrays must have names of their own.')
  return header


def _check_array(entry: Any) -> None:
  if not isinstance(entry, list) or len(entry) != 3:
    raise MessageError('an array must have a name, a dtype and a shape.')
  name, dtype, shape = entry
  if not isinstance(name, str) or len(name) > 500:
    raise MessageError('the name of an array must be text, and not long.')
  if dtype not in _DTYPES:
    raise MessageError(
      f'dtype={_shown(dtype)} must be one of {", ".join(_DTYPES)}.'
    )
  if (
    not isinstance(shape, list)
    or len(shape) > _MAX_DIMENSIONS
    or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape)
  ):
    raise MessageError(
      f'shape={_shown(shape)} must be at most {_MAX_DIMENSIONS} sizes.'
    )


def _depth(value: Any) -> int:
  """How deep lists and mappings nest."""
  depth, level = 0, [value]
  while level and depth <= _MAX_DEPTH:
    inner: list[Any] = []
    for part in level:
      if isinstance(part, dict):
        inner += part.values()
      elif isinstance(part, list):
        inner += part
    depth, level = depth + 1, inner
  return depth


def _refuse_constant(name: str) -> None:
  raise ValueError(name)


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 40 else f'{text[:37]}...'
