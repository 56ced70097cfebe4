"""Small values that processes tell each other, without their devices.

A collective such as `multihost_utils.process_allgather` occupies the device of
whoever waits in it. Here a process waits on the host, for a limited time, and
its devices go on with their work.

JAX has no public door to its coordination service, which `jax.distributed`
starts; this is the only module that knows where it is.
"""

import itertools
import json
from typing import Any

import jax
from jax._src import distributed

_numbers = itertools.count()


class ProcessError(RuntimeError):
  """Another process failed or did not come; the message is one line."""


class Rendezvous:
  """One exchange of values between all processes.

  All processes make theirs in the same order, as that tells which ones belong
  together; `exchange` may then be called from any thread. With one process
  nobody is waited for.
  """

  def __init__(self) -> None:
    self._folder = f'efficient_llm/{next(_numbers)}'
    # Now, as a thread that is late may ask when JAX has been shut down.
    self._count, self._index = jax.process_count(), jax.process_index()
    self._client: Any = distributed.global_state.client

  def exchange(self, value: Any, *, timeout_secs: float) -> list[Any]:
    """Tells a value and waits until every process has told its own.

    Args:
      value: What JSON can hold; kilobytes, as it goes through process 0.
      timeout_secs: How long the first to come waits for the last.
    Returns:
      The values in the order of the processes.
    Raises:
      ProcessError: If a process did not come in time; names it.
    """
    text = json.dumps(value)
    if self._count == 1:
      return [json.loads(text)]
    own = f'{self._folder}/{self._index}'
    self._client.key_value_set(own, text)
    self._wait('told', timeout_secs)
    told = self._told()
    # Nobody may forget a value that another one has yet to read.
    self._wait('read', timeout_secs)
    self._client.key_value_delete(own)
    return [json.loads(told[index]) for index in range(self._count)]

  def _wait(self, name: str, timeout_secs: float) -> None:
    try:
      self._client.wait_at_barrier(
        f'{self._folder}/{name}', int(1000 * timeout_secs)
      )
    except jax.errors.JaxRuntimeError as error:
      told = self._told()
      absent = [str(i) for i in range(self._count) if i not in told]
      raise ProcessError(
        f'process {", ".join(absent) or "unknown"} must come within '
        f'{timeout_secs:g} s and did not; see its log.'
      ) from error

  def _told(self) -> dict[int, str]:
    found = self._client.key_value_dir_get(self._folder)
    return {int(name.rpartition('/')[2]): text for name, text in found}
