import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from efficient_llm.diloco.network_config import NetworkConfig
from experiments import configuration, exits
from experiments.configs import diloco_network

_ROOT = pathlib.Path(__file__).parents[2]


def _run(workdir: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.diloco_network',
      f'--workdir={workdir}',
      *flags,
    ],
    cwd=_ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_binary_says_what_was_published_and_what_islands_get(
  tmp_path: pathlib.Path,
) -> None:
  done = _run(tmp_path, '--config.islands=8', '--config.num_rounds=2')
  assert done.returncode == exits.DONE, done.stderr
  assert 'global, compute, %: 83 published' in done.stdout
  assert 'tokens a day  as configured' in done.stdout
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['islands'] == 8
  assert (tmp_path / 'report.html').exists()


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    ('islands', '0', 'islands=0 must be at least 1'),
    ('schedule.hub_city', 'Oz', "City 'Oz' must be one of"),
    ('schedule.overlap_steps', '100', 'schedule.overlap_steps=100'),
    ('schedule.all_reduce', 'star', 'one of ring, hub'),
  ],
)
def test_bad_input_is_refused_in_one_line(
  field: str, value: str, expected: str, refusal: Callable[..., str]
) -> None:
  def load() -> int:
    configuration.resolve(
      'experiments/configs/diloco_network.py', NetworkConfig, {field: value}
    )
    return exits.DONE

  assert expected in refusal(load)


@pytest.mark.parametrize('name', ['nodes', 'home'])
def test_the_configurations_hold_together(name: str) -> None:
  diloco_network.get_config(name).validate()


def test_a_configuration_of_another_name_is_refused() -> None:
  with pytest.raises(ValueError, match="'office' must be one of nodes, home"):
    diloco_network.get_config('office')
