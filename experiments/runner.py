"""What every binary does: parse, check, write the configuration down, run."""

import contextlib
import dataclasses
import functools
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from efficient_llm.training import processes, strict_json
from experiments import configuration, exits, library_logs

DONE, FAILED = exits.DONE, exits.FAILED
BAD_INPUT, STOPPED = exits.BAD_INPUT, exits.STOPPED

load_config, resolve = configuration.load, configuration.resolve

_CONFIG = '--config'


def define_flags(*, workdir: str | None) -> None:
  """Defines the flags that all binaries share.

  Args:
    workdir: Default of --workdir; None makes it required.
  """
  flags.DEFINE_string(
    'config', None, 'Configuration file; --config.FIELD=VALUE changes a field.'
  )
  flags.DEFINE_string(
    'workdir', workdir, 'Folder of the run; the same folder continues it.'
  )
  flags.DEFINE_string(
    'profile_steps', None, 'FIRST:LAST writes a profiler trace of these steps.'
  )
  flags.DEFINE_bool(
    'print_config', False, 'Print the resolved configuration and exit.'
  )
  flags.DEFINE_enum(
    'platform',
    None,
    ['cpu', 'gpu', 'tpu'],
    'Fail rather than run on anything else.',
  )
  flags.DEFINE_bool(
    'distributed', False, 'Several processes, found from the cluster.'
  )
  flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, for several processes.'
  )
  flags.DEFINE_integer('num_processes', None, 'Processes in all.')
  flags.DEFINE_integer('process_id', None, 'Number of this process.')


def main(
  run: Callable[[Any, pathlib.Path], int],
  *,
  default_config: str,
  config_type: type,
  workdir: str | None = None,
  before_jax: Callable[[], None] | None = None,
  adapt: Callable[[Any], Any] | None = None,
) -> NoReturn:
  """Runs a binary; does not return.

  Args:
    run: Does the work for a configuration and a working directory and returns
      an exit code.
    default_config: Configuration file used without --config.
    config_type: The dataclass that `get_config` must return.
    workdir: Default of --workdir.
    before_jax: Called when the flags are known and no device is.
    adapt: What the binary's own flags make of the file's configuration.
  """
  define_flags(workdir=workdir)
  changes: dict[str, str] = {}

  def parse_flags(argv: Sequence[str]) -> list[str]:
    try:
      others, found = split_overrides(argv)
      changes.update(found)
      rest = flags.FLAGS(others)
      if len(rest) > 1:
        raise ValueError(
          f'{rest[1]!r} is not a flag; flags begin with --, fields with '
          '--config.'
        )
    except (flags.Error, ValueError) as error:
      exits.refuse(error)
    return rest

  def body(argv: Sequence[str]) -> NoReturn:
    del argv
    task = functools.partial(_run, run, default_config, config_type, changes)
    sys.exit(exits.guarded(lambda: task(before_jax, adapt)))

  app.run(body, flags_parser=parse_flags)
  raise AssertionError('app.run returned')


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """Parts --config.FIELD=VALUE (or ... VALUE) from other arguments.

  Raises:
    ValueError: If a field has no value.
  """
  others, found = [], {}
  arguments = iter(argv)
  for argument in arguments:
    if not argument.startswith(f'{_CONFIG}.'):
      others.append(argument)
      continue
    name, equals, text = argument.removeprefix(f'{_CONFIG}.').partition('=')
    if not equals:
      text = next(arguments, None)
      if text is None or text.startswith('--'):
        raise ValueError(
          f'{argument} must have a value; write {argument}=VALUE.'
        )
    found[name] = text
  return others, found


def start_jax(
  *,
  platform: str | None = None,
  distributed: bool = False,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the other processes and checks that the devices are those wanted.

  Raises:
    ValueError: If the flags do not fit together or JAX runs on another
      platform than asked for.
  """
  if _check_processes(coordinator, num_processes, process_id):
    distributed = True
  if distributed:
    # Only the CPU backend reads this; without it its processes stay alone.
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(
      coordinator_address=coordinator,
      num_processes=num_processes,
      process_id=process_id,
    )
  try:
    found = jax.default_backend()
  except RuntimeError as error:
    raise ValueError(
      f'JAX found no device: {error}; run python -m experiments.doctor to see '
      'why.'
    ) from error
  if platform is not None and found != platform:
    raise ValueError(
      f'--platform={platform} was asked for but JAX found only {found}; run '
      'python -m experiments.doctor to see why.'
    )
  if distributed:
    logging.info(
      'JAX process %d of %d', jax.process_index(), jax.process_count()
    )
  if jax.process_index() > 0:
    logging.set_verbosity(logging.WARNING)


def say(line: str) -> None:
  """Prints a line on standard output, once for all processes."""
  if jax.process_index() == 0:
    print(line)


def _run(
  run: Callable[[Any, pathlib.Path], int],
  default_config: str,
  config_type: type,
  changes: dict[str, str],
  before_jax: Callable[[], None] | None,
  adapt: Callable[[Any], Any] | None,
) -> int:
  values = flags.FLAGS
  library_logs.quiet()
  if values.profile_steps:
    changes['loop.profile_steps'] = values.profile_steps
  config = resolve(
    values.config or default_config, config_type, changes, adapt=adapt
  )
  if values.print_config:
    print(strict_json.to_json(dataclasses.asdict(config), indent=2))
    return DONE
  if values.workdir is None:
    raise ValueError('--workdir is missing; name a folder for this run.')
  if before_jax is not None:
    before_jax()
  start_jax(
    platform=values.platform,
    distributed=values.distributed,
    coordinator=values.coordinator,
    num_processes=values.num_processes,
    process_id=values.process_id,
  )
  workdir = pathlib.Path(values.workdir).absolute()
  with config_written(config, workdir):
    return run(config, workdir)


@contextlib.contextmanager
def config_written(config: Any, workdir: pathlib.Path) -> Iterator[None]:
  """Writes config.json; a run that is refused leaves the old one behind."""
  path = workdir / 'config.json'
  old = path.read_text(encoding='utf-8') if path.is_file() else None
  processes.on_first(lambda: write_config(config, workdir))
  try:
    yield
  except ValueError:
    if old is not None and jax.process_index() == 0:
      # On a full disk the new one stays, which the run's start rewrites.
      with contextlib.suppress(OSError):
        strict_json.write_atomically(path, old)
    raise


def _check_processes(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> bool:
  """Whether these flags are given; refuses some without the others."""
  several = (coordinator, num_processes, process_id)
  if all(value is None for value in several):
    return False
  if coordinator is None or num_processes is None or process_id is None:
    raise ValueError(
      f'{coordinator=}, {num_processes=}, {process_id=} must be given together.'
    )
  host, _, port = coordinator.rpartition(':')
  if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
    raise ValueError(
      f'--{coordinator=} must be HOST:PORT of process 0; for example '
      '10.0.0.1:8476.'
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'--{process_id=} must be at least 0 and below --{num_processes=}; count '
      'processes from 0.'
    )
  return True


def write_config(config: Any, workdir: pathlib.Path) -> None:
  """Makes the working directory and writes config.json there.

  Raises:
    ValueError: If that cannot be done.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
    text = strict_json.to_json(dataclasses.asdict(config), indent=2)
    strict_json.write_atomically(workdir / 'config.json', text + '\n')
  except OSError as error:
    raise ValueError(
      f'--workdir={workdir} must be a writable folder with space left: '
      f'{error.strerror or error}; choose another.'
    ) from error
