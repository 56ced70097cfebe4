"""What every binary does: parse, check, write the configuration down, run.

Exit codes: 0 done, 1 failure, 2 bad input (one line says what to change), 3
stopped by a signal and checkpointed: the same command continues.
"""

import dataclasses
import errno
import importlib.util
import logging as std_logging
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import jax
from absl import app, flags, logging

from efficient_llm.training import loop, strict_json
from experiments import overrides

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 3

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_CONFIG = '--config'
_STORAGE_ERRORS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EFBIG,
  errno.ENOTDIR,
  errno.EISDIR,
)

_Config = TypeVar('_Config')


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
) -> NoReturn:
  """Runs a binary; does not return.

  Args:
    run: Does the work for a configuration and a working directory and returns
      an exit code.
    default_config: Configuration file used without --config.
    config_type: The dataclass that `get_config` must return.
    workdir: Default of --workdir.
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
      _refuse(error)
    return rest

  def body(argv: Sequence[str]) -> NoReturn:
    del argv
    sys.exit(
      _guarded(lambda: _run(run, default_config, config_type, changes))
    )

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


def load_config(path: str, config_type: type[_Config]) -> _Config:
  """Runs `get_config` of a configuration file.

  The path may end in ':ARGUMENT', which `get_config` then receives. A relative
  path is looked up from here, then from the project.

  Raises:
    ValueError: If there is no such file or it gives no such configuration.
  """
  name, _, argument = path.partition('.py:')
  if argument:
    name += '.py'
  places = [pathlib.Path(name), _ROOT / name]
  file = next((place for place in places if place.is_file()), None)
  if file is None:
    known = sorted((_ROOT / 'experiments' / 'configs').glob('*.py'))
    raise ValueError(
      f'--config={path} is not a file; those that come with the project are '
      f'{", ".join(str(k.relative_to(_ROOT)) for k in known)}.'
    )
  spec = importlib.util.spec_from_file_location('run_config', file)
  if spec is None or spec.loader is None:
    raise ValueError(f'--config={path} must be a Python file ending in .py.')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(*([argument] if argument else []))
  except Exception as error:
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error).splitlines()[0] if str(error) else ''
    raise ValueError(
      f'--config={path} failed: {type(error).__name__}: {message} '
      f'({pathlib.Path(place.filename).name} line {place.lineno}); mend it.'
    ) from error
  if not isinstance(config, config_type):
    raise ValueError(
      f'get_config() of --config={path} must return a {config_type.__name__}, '
      f'got {type(config).__name__}.'
    )
  return config


def resolve(
  path: str, config_type: type[_Config], changes: dict[str, str]
) -> _Config:
  """Loads a configuration, applies overrides and checks it as a whole."""
  config = load_config(path, config_type)
  overrides.check_types(config)
  config = overrides.apply_overrides(config, changes)
  if hasattr(config, 'validate'):
    config.validate()  # pyright: ignore
  return config


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
  several = (coordinator, num_processes, process_id)
  if any(value is not None for value in several):
    if any(value is None for value in several):
      raise ValueError(
        f'{coordinator=}, {num_processes=}, {process_id=} must be given '
        'together.'
      )
    distributed = True
  if distributed:
    # Only the CPU backend reads this; without it its processes stay alone.
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(
      coordinator_address=coordinator,
      num_processes=num_processes,
      process_id=process_id,
    )
  found = jax.default_backend()
  if platform is not None and found != platform:
    raise ValueError(
      f'--platform={platform} was asked for but JAX found only {found}; run '
      'python -m experiments.doctor to see why.'
    )
  if distributed:
    logging.info(
      'JAX process %d of %d', jax.process_index(), jax.process_count()
    )


def _run(
  run: Callable[[Any, pathlib.Path], int],
  default_config: str,
  config_type: type,
  changes: dict[str, str],
) -> int:
  values = flags.FLAGS
  _quiet_libraries()
  if values.profile_steps:
    changes['loop.profile_steps'] = values.profile_steps
  config = resolve(values.config or default_config, config_type, changes)
  if values.print_config:
    print(strict_json.to_json(dataclasses.asdict(config), indent=2))
    return DONE
  if values.workdir is None:
    raise ValueError('--workdir is missing; name a folder for this run.')
  start_jax(
    platform=values.platform,
    distributed=values.distributed,
    coordinator=values.coordinator,
    num_processes=values.num_processes,
    process_id=values.process_id,
  )
  workdir = pathlib.Path(values.workdir).absolute()
  if jax.process_index() == 0:
    write_config(config, workdir)
  return run(config, workdir)


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


def _guarded(task: Callable[[], int]) -> int:
  """Turns what went wrong into one line and an exit code."""
  try:
    return task()
  except loop.NonFiniteError as error:
    print(f'error: {error}', file=sys.stderr)
    return FAILED
  except ValueError as error:
    if not _is_ours(error):
      raise
    _refuse(error)
  except OSError as error:
    if error.errno not in _STORAGE_ERRORS:
      raise
    _refuse(
      f'{error.filename or "the working directory"} cannot be written: '
      f'{error.strerror}; free space there or choose another --workdir.'
    )
  except KeyboardInterrupt:
    print('error: interrupted', file=sys.stderr)
    return FAILED


def _is_ours(error: ValueError) -> bool:
  """Whether this project raised it: then it is about input, else a defect."""
  last = traceback.extract_tb(error.__traceback__)[-1]
  return _is_in_project(last.filename)


def _is_in_project(file: str) -> bool:
  """Whether a source file is the project's, not a library's."""
  path = pathlib.Path(file)
  return path.is_relative_to(_ROOT) and 'site-packages' not in path.parts


def _refuse(error: Exception | str) -> NoReturn:
  line = ' '.join(str(error).split())
  print(f'error: {line}', file=sys.stderr)
  sys.exit(BAD_INPUT)


def _quiet_libraries() -> None:
  """Shows our own log lines, and of libraries only warnings."""
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.addFilter(
    lambda record: record.levelno >= std_logging.WARNING
    or _is_in_project(record.pathname)
  )
  handler.setFormatter(
    std_logging.Formatter('%(asctime)s %(message)s', datefmt='%H:%M:%S')
  )
