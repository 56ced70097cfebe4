"""What several processes decide and find out together."""

import pickle
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from efficient_llm.training import rendezvous

_T = TypeVar('_T')

ProcessError = rendezvous.ProcessError

# Reading a corpus takes hours; a process that has died is noticed before.
_FIRST_SECS = 24 * 3600.0


def on_first(
  task: Callable[[], _T], *, refusal: type[ValueError] = ValueError
) -> _T:
  """Runs a task on process 0 and gives every process what came of it.

  All processes must call it, in the same order as `on_all` and never from a
  background thread. With one process it is the plain call.

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
  replies = rendezvous.Rendezvous().exchange(reply, timeout_secs=_FIRST_SECS)
  if failure:
    raise failure
  reply = replies[0]
  if 'error' in reply:
    raise (refusal if reply['is_refusal'] else OSError)(reply['error'])
  return cast(_T, reply['value'])


def on_all(task: Callable[[], _T], *, timeout_secs: float) -> list[_T]:
  """Runs a task in every process and gives each what all of them returned.

  All processes must call it, in the same order as `on_first` and never from a
  background thread. The task must not need the others, as it may fail in one
  process alone; then all raise. With one process it is the plain call.

  Args:
    task: Returns what can be pickled, of any size.
    timeout_secs: How long the first to end waits for the last.

  Returns:
    In the order of the processes.

  Raises:
    Exception: What the task raised here.
    ProcessError: If it raised in another process, or that one did not come.
  """
  if jax.process_count() == 1:
    return [task()]
  failure, pickled = None, b''
  try:
    pickled = pickle.dumps(task())
  except Exception as error:
    failure = error
  report = {'num_bytes': len(pickled), 'error': _one_line(failure)}
  # Before the collective, whose patience may be that of a network: 30 s.
  reports = rendezvous.Rendezvous().exchange(report, timeout_secs=timeout_secs)
  if failure is not None:
    raise failure
  for index, other in enumerate(reports):
    if other['error'] is not None:
      raise ProcessError(f'process {index} failed: {other["error"]}')
  return [
    pickle.loads(part)
    for part in _gather(pickled, [other['num_bytes'] for other in reports])
  ]


def _gather(part: bytes, sizes: list[int]) -> list[bytes]:
  """The parts of all processes, over the devices' network."""
  # Powers of two, so that few programs are compiled.
  buffer = np.zeros(1 << (max(sizes) - 1).bit_length(), np.uint8)
  buffer[: len(part)] = np.frombuffer(part, np.uint8)
  gathered = multihost_utils.process_allgather(buffer)
  return [
    row[:size].tobytes() for row, size in zip(gathered, sizes, strict=True)
  ]


def _one_line(error: Exception | None) -> str | None:
  if error is None:
    return None
  return f'{type(error).__name__}: {" ".join(str(error).split())}'
