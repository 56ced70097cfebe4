"""A run's configuration: a Python file, changed by the command line."""

import importlib.util
import pathlib
import traceback
from collections.abc import Callable
from typing import TypeVar

from experiments import overrides

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_Config = TypeVar('_Config')


def load(
  path: str, config_type: type[_Config] | tuple[type[_Config], ...]
) -> _Config:
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
    known = sorted((_ROOT / 'experiments' / 'configs').glob('[a-z]*.py'))
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
    raise ValueError(
      f'--config={path} failed{_line_of(error, file)}: '
      f'{type(error).__name__}: {" ".join(str(error).split())}; mend it.'
    ) from error
  if not isinstance(config, config_type):
    types = config_type if isinstance(config_type, tuple) else (config_type,)
    names = [one.__name__ for one in types]
    raise ValueError(
      f'get_config() of --config={path} must return a {" or ".join(names)}, '
      f'got {type(config).__name__}.'
    )
  return config


def resolve(
  path: str,
  config_type: type[_Config] | tuple[type[_Config], ...],
  changes: dict[str, str],
  *,
  adapt: Callable[[_Config], _Config] | None = None,
) -> _Config:
  """Loads a configuration, applies overrides and checks it as a whole.

  Args:
    path: Of the file, as in `load`.
    config_type: What it gives, or may give.
    changes: Text by dotted field.
    adapt: What a program's own flags make of the file, before the changes.
  """
  config = load(path, config_type)
  if adapt is not None:
    config = adapt(config)
  overrides.check_types(config)
  config = overrides.apply_overrides(config, changes)
  validate = getattr(config, 'validate', None)
  if validate is not None:
    validate()
  return config


def _line_of(error: Exception, file: pathlib.Path) -> str:
  """Where in the configuration file it went wrong, as far as is known."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == str(file)]
  return f' in line {lines[-1]}' if lines else ''
