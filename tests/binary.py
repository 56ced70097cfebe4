"""Starts an experiment as users do, in a process of its own."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

_ROOT = pathlib.Path(__file__).parents[1]
_PATIENCE_SECS = 300.0
_PROGRAM = """
import runpy
runpy.run_module({0!r}, run_name='__main__', alter_sys=True)
"""
_LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""


def start(
  arguments: Sequence[str],
  *,
  cache: pathlib.Path,
  largest_file: int | None = None,
  module: str = 'experiments.pretrain',
  environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
  """Starts an experiment.

  Args:
    arguments: Of the command line.
    cache: Folder of compiled programs.
    largest_file: Bytes no file may exceed, as on a full disk.
    module: The experiment.
    environment: Further environment variables.
  """
  program = _PROGRAM.format(module)
  if largest_file is not None:
    program = _LIMIT.format(largest_file) + program
  return subprocess.Popen(
    [sys.executable, '-c', program, *arguments],
    cwd=_ROOT,
    env={
      **os.environ,
      'JAX_COMPILATION_CACHE_DIR': str(cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.05',
      **(environment or {}),
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_together(
  arguments: Sequence[str], *, count: int, cache: pathlib.Path, module: str
) -> list[subprocess.Popen[str]]:
  """Starts several processes of one run.

  Args:
    arguments: Of all of them.
    count: How many; one is started as users start it.
    cache: Folder of compiled programs, one for each process below it.
    module: The experiment.
  """
  port = free_port()
  together = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}']
  return [
    start(
      [*arguments, *together, f'--process_id={index}']
      if count > 1
      else arguments,
      cache=cache / f'{count}-{index}',
      module=module,
    )
    for index in range(count)
  ]


def free_port() -> int:
  """A port of this machine that nobody uses now."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


def finish_all(
  processes: Sequence[subprocess.Popen[str]],
) -> list[tuple[int, str, str]]:
  """Waits for all; one that is left alone must not hang for ever."""
  try:
    return [finish(process) for process in processes]
  finally:
    for process in processes:
      process.kill()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
  """Waits for exit code, standard output and standard error."""
  try:
    out, err = process.communicate(timeout=_PATIENCE_SECS)
  except subprocess.TimeoutExpired:
    process.kill()
    _, err = process.communicate()
    raise AssertionError(f'still running:\n{err}') from None
  return process.returncode, out, err


def wait_until(
  condition: Callable[[], bool], process: subprocess.Popen[str]
) -> None:
  """Waits while the process runs until something is so."""
  deadline = time.monotonic() + _PATIENCE_SECS
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.01)


def num_lines(workdir: pathlib.Path) -> int:
  """Lines of metrics that a run has written so far."""
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def write_config(folder: pathlib.Path, source: str) -> pathlib.Path:
  """Writes a configuration file whose `get_config` gives this expression."""
  file = folder / 'run.py'
  file.write_text(
    'import dataclasses, pathlib\n'
    'from tests import tiny\n'
    'def get_config():\n'
    f'  return {source}\n'
  )
  return file
