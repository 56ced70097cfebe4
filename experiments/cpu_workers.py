"""--cpu_workers: a device of each core, as XLA gives one device all of them."""

import os

import jax
from absl import flags

_WORKERS = flags.DEFINE_integer(
  'cpu_workers', None, 'Devices on a CPU, each with one core.'
)
# Devices wait for each other inside collectives, each in a thread of a pool
# that has one for each core: on two cores two devices now and then waited for
# ever for a thread. The pool is as large as NPROC says.
_THREADS_PER_DEVICE = 8
# On a machine with other work a device may come late; XLA gives up after 40.
_PATIENCE_SECS = 600


def start() -> None:
  """Makes as many as the flag says; called before a device is asked for."""
  if _WORKERS.value is not None:
    make_devices(_WORKERS.value)


def make_devices(count: int) -> None:
  """Makes a device of each of `count` cores; before a device is asked for.

  Raises:
    ValueError: If there is to be none.
  """
  if count < 1:
    raise ValueError(f'--cpu_workers={count} must be at least 1.')
  jax.config.update('jax_num_cpu_devices', count)
  os.environ.setdefault('NPROC', str(count * _THREADS_PER_DEVICE))
  options = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = (
    f'{options} --xla_cpu_multi_thread_eigen=false '
    f'--xla_cpu_collective_call_terminate_timeout_seconds={_PATIENCE_SECS}'
  )
