"""Tests of the launching command, as users start it."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments.launch import slurm
from tests import launch_jobs

_ROOT = pathlib.Path(__file__).parents[2]


def _launch(
  *arguments: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'experiments.launch', *arguments],
    cwd=_ROOT,
    env={**os.environ, **({'PATH': path} if path is not None else {})},
    capture_output=True,
    text=True,
    check=False,
  )


def test_a_dry_run_writes_the_files_and_submits_nothing(
  tmp_path: pathlib.Path,
) -> None:
  run = _launch(
    '--target=slurm',
    '--accelerator=h100:8x2',
    '--job=python -m experiments.pretrain --workdir=out/x --config.seed=3',
    '--name=seed-3',
    f'--out={tmp_path}',
    '--dry_run',
    # Submitting would fail.
    path=str(tmp_path),
  )
  assert (run.returncode, run.stderr) == (0, '')
  assert run.stdout == f'{tmp_path / slurm.FILE}\n'
  assert '--config.seed=3 --platform=gpu' in (tmp_path / slurm.FILE).read_text()
  assert os.access(tmp_path / slurm.FILE, os.X_OK)


def test_a_command_that_would_be_refused_is_refused_before(
  tmp_path: pathlib.Path,
) -> None:
  run = _launch(
    '--target=slurm',
    '--accelerator=h100:8x2',
    '--job=python -m experiments.pretrain --workdir=out/x --config.sead=3',
    f'--out={tmp_path / "files"}',
    '--dry_run',
  )
  assert run.returncode == 2
  (line,) = run.stderr.splitlines()
  assert line.startswith('error: --job would be refused: --config.sead is not')
  assert not (tmp_path / 'files').exists()


@pytest.mark.parametrize(
  ('target', 'tool'), [('tpu_vm', 'gcloud'), ('gke TPU', 'kubectl')]
)
def test_a_missing_tool_is_named_in_one_line(
  target: str, tool: str, tmp_path: pathlib.Path
) -> None:
  name, fields = launch_jobs.JOBS[target]
  flags = [f'--{key}={value}' for key, value in fields.items()]
  run = _launch(
    f'--target={name}', f'--job={launch_jobs.COMMAND}', '--nocheck', *flags,
    f'--out={tmp_path}', path=str(tmp_path),
  )  # fmt: skip
  assert run.returncode == 2
  (line,) = run.stderr.splitlines()
  assert line.startswith(f'error: {tool} is not installed here; install it, or')
  assert str(tmp_path) in line


def test_the_exit_code_is_that_of_the_tool(tmp_path: pathlib.Path) -> None:
  tool = tmp_path / 'sbatch'
  tool.write_text('#!/bin/sh\necho "given $1"\nexit 7\n')
  tool.chmod(0o755)
  run = _launch(
    '--target=slurm', '--accelerator=gpu:1', '--nocheck',
    '--job=python -m experiments.pretrain --workdir=out/x',
    f'--out={tmp_path}', path=f'{tmp_path}:{os.environ["PATH"]}',
  )  # fmt: skip
  assert run.returncode == 7, run.stderr
  assert run.stdout.splitlines()[-1] == f'given {tmp_path / slurm.FILE}'
