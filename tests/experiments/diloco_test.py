"""Tests of the binary that trains islands, in real processes."""

import json
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'experiments.diloco', *arguments],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_fields_of_islands_are_flags() -> None:
  run = _run(
    '--print_config',
    '--config=experiments/configs/diloco_cpu.py:streaming',
    '--config.islands=8',
    '--config.sync_period=50',
    '--config.compression.format=int8',
    '--config.membership.absences=1:5:9,2:7:8',
  )
  assert run.returncode == 0, run.stderr
  config = json.loads(run.stdout)
  assert config['islands'] == 8
  assert config['sync_period'] == 50
  assert config['compression']['format'] == 'int8'
  assert config['membership']['absences'] == ['1:5:9', '2:7:8']


def test_bad_input_gives_one_line_and_code_2(tmp_path: pathlib.Path) -> None:
  workdir = tmp_path / 'refused'
  run = _run(f'--workdir={workdir}', '--config.fragments.count=9')
  assert (run.returncode, run.stdout) == (2, '')
  assert len(run.stderr.splitlines()) == 1
  assert 'fragments.count=9 must be in [1, 4]' in run.stderr
