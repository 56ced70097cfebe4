"""Tests of configuration files."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from efficient_llm.training import pretrain
from experiments import runner

Refusal = Callable[[Callable[[], Any]], str]


_ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
  ('source', 'expected'),
  [
    (None, 'is not a file; those that come with the project are experiments/'),
    ('def get_config(:', 'SyntaxError'),
    ('x = 1', "has no attribute 'get_config'"),
    ('def get_config():\n  return 3', 'must return a PretrainConfig, got int'),
    ('\n\nraise KeyError("a\\nb")', 'failed in line 3: KeyError'),
    ('def get_config():\n  return 1 / 0', 'in line 2: ZeroDivisionError'),
    (
      'from efficient_llm.models import presets\n'
      'def get_config():\n'
      "  return presets.get('huge')",
      "in line 3: ValueError: Unknown model preset 'huge'",
    ),
    (
      'from efficient_llm.training import pretrain\n'
      'def get_config():\n'
      '  return pretrain.PretrainConfig(seed="0")',
      "config.seed='0' must be a whole number",
    ),
  ],
)
def test_a_bad_configuration_file_is_refused(
  source: str | None,
  expected: str,
  tmp_path: pathlib.Path,
  refusal: Refusal,
) -> None:
  file = tmp_path / 'run.py'
  if source is not None:
    file.write_text(source)
  task = functools.partial(
    runner.resolve, str(file), pretrain.PretrainConfig, {}
  )
  assert expected in refusal(task)


def test_a_configuration_file_may_take_an_argument(
  tmp_path: pathlib.Path,
) -> None:
  file = tmp_path / 'run.py'
  file.write_text(
    'from efficient_llm.training import pretrain\n'
    'def get_config(seed="1"):\n'
    '  return pretrain.PretrainConfig(seed=int(seed))\n'
  )
  load = functools.partial(
    runner.load_config, config_type=pretrain.PretrainConfig
  )
  assert load(str(file)).seed == 1
  assert load(f'{file}:23').seed == 23


@pytest.mark.parametrize(
  'file', sorted((_ROOT / 'experiments' / 'configs').glob('pretrain*.py'))
)
def test_every_configuration_of_the_project_is_valid(
  file: pathlib.Path,
) -> None:
  runner.resolve(str(file), pretrain.PretrainConfig, {})
