"""Tests of what libraries may say."""

import subprocess
import sys

_FAILED_BESIDE_ANOTHER = """
import asyncio
import resource
import sys
import tempfile

import jax.numpy as jnp
from absl import logging

from efficient_llm.training import checkpoint
from experiments import library_logs

logging.use_absl_handler()
library_logs.quiet()
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


async def fails():
  raise ValueError('disk full')


async def forgets():
  loop = asyncio.get_running_loop()
  loop.create_task(fails())
  await asyncio.sleep(0.01)


arrays = {f'a{i}': jnp.ones((100, 101 + i)) for i in range(12)}
with tempfile.TemporaryDirectory() as folder:
  saved = checkpoint.Checkpointer(folder, checkpoint.CheckpointConfig())
  saved.save(1, arrays, data_state=None, metadata={})
  try:
    saved.close()
  except checkpoint.CheckpointError:
    print('error', file=sys.stderr)
asyncio.run(forgets())
"""


def test_what_failed_beside_a_failed_save_is_not_told() -> None:
  ended = subprocess.run(
    [sys.executable, '-c', _FAILED_BESIDE_ANOTHER],
    capture_output=True,
    text=True,
    check=True,
  )
  assert ended.stderr == 'error\n'
