"""Writes what a batch run needs, and submits it.

./run.sh python -m experiments.launch --target=slurm --accelerator=h100:8x2 \
  --job='python -m experiments.diloco --workdir=out/islands' --dry_run

Exit codes: 0 done, 2 bad input, else that of the submitting tool.
"""

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import command
from experiments.launch import job as job_lib
from experiments.launch import machines, targets

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_TEXTS = {
  'name': 'Of the run, for the scheduler.',
  'accelerator': f'Machines: {machines.SYNTAX}.',
  'image': 'Container image that holds the code; the Dockerfile makes it.',
  'bucket': f'gs://NAME, mounted at {job_lib.MOUNT}; docker: a folder here.',
  'cluster': 'That xpk submits to.',
  'zone': 'Of the machines.',
  'project': 'Of the cloud.',
  'partition': 'Of the SLURM cluster.',
  'prologue': 'Shell line before the command, in place of run.sh (SLURM).',
}
_NUMBERS = {
  'hours': 'After which SLURM ends the job, which then continues.',
  'grace_secs': 'Between the signal to stop and the end (not skypilot).',
  'max_restarts': 'After failures (not slurm, docker).',
}


def define_flags() -> None:
  """Defines the flags of this tool."""
  flags.DEFINE_enum('target', None, list(targets.TARGETS), 'Where it runs.')
  flags.DEFINE_string('job', None, 'The command, as typed on one machine.')
  for name, text in _TEXTS.items():
    flags.DEFINE_string(name, getattr(job_lib.Job, name, None), text)
  for name, text in _NUMBERS.items():
    flags.DEFINE_integer(name, getattr(job_lib.Job, name), text)
  flags.DEFINE_bool(
    'spot',
    False,
    'Cheaper machines that may be taken away (tpu_vm, gke, skypilot).',
  )
  flags.DEFINE_bool('dry_run', False, 'Write the files and submit nothing.')
  flags.DEFINE_bool(
    'check', True, "Try the command's flags and configuration here first."
  )
  flags.DEFINE_string('out', None, 'Folder of the files; out/launch/NAME.')


def run(changes: dict[str, str]) -> int:
  """Writes the files and submits them; gives the exit code."""
  values = flags.FLAGS
  if changes:
    raise ValueError(
      f'--config.{next(iter(changes))} belongs to the command; put it inside '
      "--job='...'."
    )
  for name in ('target', 'job', 'accelerator'):
    if not values[name].value:
      raise ValueError(f'--{name} is missing; see --help.')
  fields: dict[str, Any] = {
    name: values[name].value for name in (*_TEXTS, *_NUMBERS, 'spot')
  }
  job = job_lib.Job(command=values.job, **fields)
  files = targets.render(values.target, job)
  if values.check:
    check_command(job)
  folder = pathlib.Path(values.out or _ROOT / 'out' / 'launch' / job.name)
  write(files, folder)
  for name in files:
    print(folder / name)
  if values.dry_run:
    return 0
  return submit(targets.TARGETS[values.target], folder.absolute())


def check_command(job: job_lib.Job) -> None:
  """Lets the binary read its flags and configuration here, on the CPU.

  Raises:
    ValueError: With what it said, if it refused them.
  """
  answer = subprocess.run(
    [sys.executable, *job.words[1:], '--print_config'],
    cwd=_ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  if answer.returncode:
    lines = answer.stderr.strip().splitlines() or ['no message']
    said = lines[-1].removeprefix('error: ')
    raise ValueError(
      f'--job would be refused: {said} (--nocheck, if only this machine is at '
      'fault)'
    )


def write(files: dict[str, str], folder: pathlib.Path) -> None:
  """Writes the files; scripts may be executed."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in files.items():
    path = folder / name
    path.write_text(text, encoding='utf-8')
    path.chmod(0o755 if text.startswith('#!') else 0o644)


def submit(target: targets.Target, folder: pathlib.Path) -> int:
  """Runs the command that submits; gives its exit code.

  Raises:
    ValueError: If its tool is not installed.
  """
  tool = target.tool or target.submit[0]
  if shutil.which(tool) is None:
    raise ValueError(
      f'{tool} is not installed here; install it, or run this where it is: '
      f'{" ".join(_submit_words(target, folder))}'
    )
  cwd = _ROOT if target.at_root else folder
  return subprocess.run(
    _submit_words(target, folder), cwd=cwd, check=False
  ).returncode


def _submit_words(
  target: targets.Target, folder: pathlib.Path
) -> Sequence[str]:
  *words, last = target.submit
  if last.startswith('--'):
    flag, _, file = last.partition('=')
    return [*words, f'{flag}={folder / file}']
  return [*words, str(folder / last)]


if __name__ == '__main__':
  command.main(define_flags, run)
