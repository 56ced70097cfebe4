"""One of two processes that meet.

python -m tests.training.processes_process INDEX PORT
"""

import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm.training import processes, rendezvous


def say(*words: Any) -> None:
  print('answer:', *words, flush=True)


def run(index: int, port: str) -> None:
  """Does what `processes_test` asks about, a line for each."""
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(
    f'127.0.0.1:{port}', num_processes=2, process_id=index
  )
  say(rendezvous.Rendezvous().exchange({'of': index}, timeout_secs=60.0))
  say(_steps_while_waiting(index))
  shape = [(2, 3), (1,)][index]
  found = processes.on_all(lambda: np.full(shape, index), timeout_secs=60.0)
  say([x.tolist() for x in found])
  say(processes.on_first(lambda: jax.process_index()))

  def fail() -> None:
    if index == 1:
      raise LookupError('no such\nthing')

  for task, timeout_secs in ((fail, 60.0), (lambda: _late(index), 1.0)):
    try:
      processes.on_all(task, timeout_secs=timeout_secs)
    except (processes.ProcessError, LookupError) as error:
      say(type(error).__name__, str(error).replace('\n', ' '))


def _steps_while_waiting(index: int) -> bool:
  """Whether the device of the first works while it waits for the second."""
  x = (jnp.zeros(()) + 1).block_until_ready()
  if index == 1:
    time.sleep(1.0)
  meeting, met = rendezvous.Rendezvous(), threading.Event()

  def meet() -> None:
    meeting.exchange(None, timeout_secs=60.0)
    met.set()

  threading.Thread(target=meet).start()
  count = 0
  while not met.is_set():
    x = (x + 1).block_until_ready()
    count += 1
  return index == 1 or count > 100


def _late(index: int) -> None:
  if index == 1:
    time.sleep(4.0)


if __name__ == '__main__':
  run(int(sys.argv[1]), sys.argv[2])
