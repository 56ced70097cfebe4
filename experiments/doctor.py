"""Checks a machine before a run: one line each, ok, warn or FAIL.

    python -m experiments.doctor --want=gpu --devices=8 --workdir=DIR

For one of several processes add --coordinator=HOST:PORT, --num_processes and
--process_id: the coordinator must then be reachable.

Exit codes: 0 nothing failed, 1 a check failed, 2 flags that make no sense.
"""

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags

# Imports none of the libraries that it checks: they may be what is broken.
from experiments import coordinator, health

_OK, _FAILED, _BAD_INPUT = 0, 1, 2


def define_flags() -> None:
  """Defines the flags of this tool."""
  flags.DEFINE_enum(
    'want', None, ['cpu', 'gpu', 'tpu'], 'Platform that the run is meant for.'
  )
  flags.DEFINE_integer(
    'devices', None, 'Devices that the run is meant for.', lower_bound=1
  )
  flags.DEFINE_string('workdir', '.', 'Folder of the run.')
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0.')
  flags.DEFINE_integer(
    'num_processes', None, 'Processes in all.', lower_bound=1
  )
  flags.DEFINE_integer(
    'process_id', None, 'Number of this process.', lower_bound=0
  )
  flags.DEFINE_integer(
    'num_hosts', None, 'Machines in all, where known.', lower_bound=1
  )
  flags.DEFINE_bool('json', False, 'Print one JSON object as the last line.')


def check_all() -> list[health.Check]:
  """Runs every check that the flags ask for.

  Raises:
    ValueError: If the flags do not fit together.
  """
  values = flags.FLAGS
  several = {
    name: values[name].value
    for name in ('coordinator', 'num_processes', 'process_id')
  }
  given = [name for name, value in several.items() if value is not None]
  if given and len(given) < len(several):
    missing = next(name for name in several if name not in given)
    raise ValueError(
      f'--{given[0]} needs --{missing} too; give all of '
      '--coordinator, --num_processes and --process_id.'
    )
  if given and values.process_id >= values.num_processes:
    raise ValueError(
      f'--process_id={values.process_id} must be below '
      f'--num_processes={values.num_processes}; count from 0.'
    )
  if given:
    coordinator.parse_address(values.coordinator)
  checks = [
    *health.check_versions(),
    *health.check_devices(
      health.ask_jax(), want=values.want, num_devices=values.devices
    ),
    *health.check_host_memory(),
    *health.check_disk(pathlib.Path(values.workdir)),
    *health.check_environment(),
  ]
  if given:
    checks += coordinator.check(
      values.coordinator,
      process_id=values.process_id,
      num_hosts=values.num_hosts or _num_hosts_of_cluster(),
    )
  return checks


def _num_hosts_of_cluster() -> int | None:
  """What Slurm or a TPU pod says; None where neither is there."""
  nodes = os.environ.get('SLURM_JOB_NUM_NODES', '')
  if nodes.isdigit():
    return int(nodes)
  workers = os.environ.get('TPU_WORKER_HOSTNAMES')
  return len(workers.split(',')) if workers else None


def main(argv: Sequence[str]) -> NoReturn:
  """Prints the checks and exits."""
  try:
    if len(argv) > 1:
      raise ValueError(f'{argv[1]!r} is not a flag; flags begin with --.')
    checks = check_all()
  except ValueError as error:
    _refuse(error)
  width = max(len(check.name) for check in checks)
  for check in checks:
    print(f'{check.status:4}  {check.name:{width}}  {check.message}')
  has_failed = any(check.status == 'FAIL' for check in checks)
  if flags.FLAGS.json:
    rows = [vars(check) for check in checks]
    print(json.dumps({'ok': not has_failed, 'checks': rows}))
  sys.exit(_FAILED if has_failed else _OK)


def _parse_flags(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _refuse(error)


def _refuse(error: Exception) -> NoReturn:
  print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
  sys.exit(_BAD_INPUT)


if __name__ == '__main__':
  define_flags()
  app.run(main, flags_parser=_parse_flags)
