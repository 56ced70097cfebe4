"""Islands in processes of their own: the result of one process, and a stop."""

import json
import pathlib
import signal
import subprocess

import jax
import numpy as np
import pytest

from efficient_llm.training import metrics, saved_run
from tests import binary, tiny

_NUM_STEPS = 30


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('islands')
  text = tiny.write_text(folder / 'text')
  (folder / 'run.py').write_text(
    'import dataclasses, pathlib\n'
    'from efficient_llm.diloco import compression, fragments\n'
    'from tests import tiny\n'
    'from tests.diloco import islands\n'
    'def get_config():\n'
    '  config = islands.config(\n'
    f'    pathlib.Path({str(text)!r}),\n'
    f'    loop=dict(num_steps={_NUM_STEPS}, log_every=1, eval_every=10,\n'
    '      every_steps=10),\n'
    '    model=dataclasses.replace(tiny.MODEL, num_layers=2),\n'
    '    islands=4,\n'
    '    fragments=fragments.FragmentConfig(2, overlap_steps=1, mixing=0.5),\n'
    "    compression=compression.CompressionConfig('int8'),\n"
    '  )\n'
    # The default of 1e-8 would amplify what rounding leaves.
    '  optimizer = dataclasses.replace(config.optimizer, epsilon=1e-4)\n'
    '  return dataclasses.replace(config, optimizer=optimizer)\n'
  )
  return folder


def _start(
  base: pathlib.Path, workdir: pathlib.Path, *, count: int
) -> list[subprocess.Popen[str]]:
  return binary.start_together(
    [f'--config={base / "run.py"}', f'--workdir={workdir}'],
    count=count,
    cache=base / 'cache',
    module='experiments.diloco',
  )


def _finish(processes: list[subprocess.Popen[str]], code: int) -> None:
  ends = binary.finish_all(processes)
  assert [found for found, _, _ in ends] == [code] * len(processes), ends


@pytest.mark.slow
def test_two_processes_stop_and_go_on_to_the_result_of_one(
  base: pathlib.Path,
) -> None:
  one, two = base / 'one', base / 'two'
  _finish(_start(base, one, count=1), 0)
  processes = _start(base, two, count=2)
  binary.wait_until(lambda: binary.num_lines(two) >= 8, processes[0])
  processes[1].send_signal(signal.SIGTERM)
  _finish(processes, 3)
  _finish(_start(base, two, count=2), 0)

  lines = [metrics.read_metrics(folder, kind='train') for folder in (one, two)]
  steps = [[line['step'] for line in found] for found in lines]
  assert steps[0] == steps[1] == list(range(1, _NUM_STEPS + 1))
  # A process counts its own islands' tokens and takes the others' as as many.
  tokens = [[line['tokens'] for line in found] for found in lines]
  np.testing.assert_allclose(*tokens, rtol=0.02)
  trees = [
    saved_run.restore_params(folder / 'checkpoints', None)
    for folder in (one, two)
  ]
  # Gradients are summed in another order, and int8 rounds to steps.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4e-3), *trees)
  results = [
    json.loads((folder / 'result.json').read_text()) for folder in (one, two)
  ]
  sent = [result['sent_bytes_per_island'] for result in results]
  assert sent[0] == sent[1] > 0
  assert results[1]['environment']['process_count'] == 2
