"""A frame in a Flower message: one array of bytes, which Flower cuts up."""

import functools
import types

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

_NAME = 'frame'
_FETCHERS = {'pull_objects', 'pull_and_inflate_object_from_tree'}
_PAUSE_SECS = 0.25


def fetch_promptly(module: types.ModuleType) -> None:
  """Looks for parts of a message that is being sent four times a second.

  Flower's own pauses are 1 s at first and grow to 10 s, and it gives up after
  500 of them.

  Args:
    module: Of Flower, which fetches parts.
  """
  for name in _FETCHERS & module.__dict__.keys():
    module.__dict__[name] = functools.partial(
      module.__dict__[name],
      initial_backoff=_PAUSE_SECS,
      backoff_cap=_PAUSE_SECS,
      max_tries_per_object=None,
    )


def pack(frame: bytes) -> RecordDict:
  """The content of a message that carries a frame."""
  values = np.frombuffer(frame, np.uint8)
  return RecordDict({_NAME: ArrayRecord({_NAME: Array(ndarray=values)})})


def unpack(message: Message) -> bytes:
  """The frame that a message carries; empty if it carries none."""
  record = message.content.array_records.get(_NAME)
  array = None if record is None else record.get(_NAME)
  if array is None:
    return b''
  try:
    values = array.numpy()
  except (ValueError, TypeError, EOFError):
    # Bytes that are no array: the frame is refused like any other.
    return b''
  return np.ascontiguousarray(values).tobytes()
