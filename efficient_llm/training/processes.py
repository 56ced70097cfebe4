"""Decisions that one process takes for all."""

import json
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

_T = TypeVar('_T')


def on_first(
  task: Callable[[], _T], *, refusal: type[ValueError] = ValueError
) -> _T:
  """Runs a task on process 0 and gives every process what came of it.

  A collective: all processes must call it, in the same order as their other
  collectives and never from a background thread. With one process it is the
  plain call.

  Args:
    task: Returns what JSON can hold.
    refusal: Which ValueError the other processes raise if process 0 did.

  Returns:
    What it returned.

  Raises:
    OSError: If the task raised one.
    ValueError: If the task raised one; of class `refusal` elsewhere.
  """
  if jax.process_count() == 1:
    return task()
  failure: Exception | None = None
  reply: dict[str, object] = {}
  if jax.process_index() == 0:
    try:
      reply = {'value': task()}
    except (OSError, ValueError) as error:
      failure = error
      is_refusal = isinstance(error, ValueError)
      reply = {'error': str(error), 'is_refusal': is_refusal}
  text = json.dumps(reply).encode()
  num_bytes = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  buffer = np.zeros(num_bytes, np.uint8)
  if jax.process_index() == 0:
    buffer[:] = np.frombuffer(text, np.uint8)
  received = np.asarray(multihost_utils.broadcast_one_to_all(buffer))
  if failure:
    raise failure
  reply = json.loads(received.astype(np.uint8).tobytes())
  if 'error' in reply:
    raise (refusal if reply['is_refusal'] else OSError)(reply['error'])
  return cast(_T, reply['value'])
