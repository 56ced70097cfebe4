"""Flower's programs beside a hub or an island: what they are started with."""

import importlib.util
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_MODULE = 'efficient_llm.diloco.wan.flower_process'
_POLL_SECS = '0.2'


def check_installed() -> None:
  """Refuses to go on without Flower.

  Raises:
    ValueError: Saying how to install it.
  """
  if importlib.util.find_spec('flwr') is None:
    raise ValueError(
      'islands over the internet need Flower; install it by pip install -e '
      '.[wan].'
    )


def start(
  arguments: Sequence[str], *, home: pathlib.Path, log: pathlib.Path
) -> subprocess.Popen[bytes]:
  """Starts one of the programs of `flower_process`; it ends with this one.

  Args:
    arguments: Its name and flags.
    home: Folder for what Flower keeps.
    log: File that what it prints is added to.
  """
  home.mkdir(parents=True, exist_ok=True)
  with log.open('ab') as output:
    return subprocess.Popen(
      [sys.executable, '-m', _MODULE, *arguments],
      stdin=subprocess.DEVNULL,
      stdout=output,
      stderr=subprocess.STDOUT,
      env=_environment(home),
    )


def stop(process: subprocess.Popen[bytes]) -> None:
  """Ends a program, gently first."""
  if process.poll() is None:
    process.terminate()
    try:
      process.wait(10)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


def _environment(home: pathlib.Path) -> dict[str, str]:
  programs = str(pathlib.Path(sys.executable).parent)
  paths = [str(_ROOT), os.environ.get('PYTHONPATH', '')]
  return {
    **os.environ,
    # Flower starts its programs by name.
    'PATH': os.pathsep.join([programs, os.environ.get('PATH', '')]),
    'PYTHONPATH': os.pathsep.join(path for path in paths if path),
    'FLWR_HOME': str(home),
    'FLWR_TELEMETRY_ENABLED': '0',
    'FLWR_DISABLE_UPDATE_CHECK': '1',
    'FLWR_SUPEREXEC_TASK_POLL_INTERVAL': _POLL_SECS,
    # The hub computes on the CPU, for the same bits on every machine.
    'JAX_PLATFORMS': 'cpu',
    'PYTHONUNBUFFERED': '1',
  }


def free_port() -> int:
  """A port of this machine that nobody has."""
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]
