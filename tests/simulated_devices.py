"""Runs a program of the tests on eight simulated devices."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

_ROOT = pathlib.Path(__file__).parents[1]


def flags(num_devices: int = 8) -> str:
  """XLA_FLAGS of a process with so many devices, compiled as all tests are."""
  return (
    f'{os.environ.get("XLA_FLAGS", "")} '
    f'--xla_force_host_platform_device_count={num_devices}'
  )


def run(module: str) -> dict[str, Any]:
  """What a module says in its last line, as JSON.

  Args:
    module: A program of its own, as the number of simulated devices is fixed
      before jax starts.
  """
  with tempfile.TemporaryDirectory() as programs:
    found = subprocess.run(
      [sys.executable, '-m', module],
      cwd=_ROOT,
      env={
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        # Compiles in half the time. The emitters are those of users, whose
        # rounding is that of the codes that are compared.
        'XLA_FLAGS': '--xla_force_host_platform_device_count=8 '
        '--xla_backend_optimization_level=0',
        # What is compiled to be read is not compiled again to be run.
        'JAX_COMPILATION_CACHE_DIR': programs,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
      },
      capture_output=True,
      text=True,
      check=False,
    )
  assert found.returncode == 0, found.stderr
  return json.loads(found.stdout.splitlines()[-1])
