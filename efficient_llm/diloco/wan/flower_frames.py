"""A frame in a Flower message: one array of bytes, which Flower cuts up."""

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

_NAME = 'frame'


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
