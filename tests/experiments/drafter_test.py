"""Tests of the drafter binary in real processes."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from efficient_llm.speculative import drafter_training
from efficient_llm.training import interchange, pretrain, trained_run
from tests import binary, tiny

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with a target and a configuration of a run to be stopped."""
  folder = tmp_path_factory.mktemp('drafter')
  text = tiny.write_text(folder / 'text')
  pretrain.train(tiny.config(text, eval_every=None), workdir=folder / 'target')
  (folder / 'run.py').write_text(
    'import pathlib\n'
    'from efficient_llm.speculative import drafter_training\n'
    'from tests import tiny\n'
    'def get_config():\n'
    f'  config = tiny.config(pathlib.Path({str(text)!r}), num_steps=150,\n'
    '    log_every=1, eval_every=60, every_steps=50)\n'
    '  return drafter_training.DrafterConfig(\n'
    '    optimizer=config.optimizer, loop=config.loop)\n'
  )
  return folder


def _start(base: pathlib.Path, *more: str) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'experiments.drafter'),
      f'--config={base / "run.py"}',
      *more,
    ],
    cwd=_ROOT,
    env={
      **os.environ,
      'JAX_COMPILATION_CACHE_DIR': str(base / 'programs'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.05',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.fixture(scope='module')
def whole(base: pathlib.Path) -> pathlib.Path:
  """The folder of a run that nothing interrupts."""
  workdir = base / 'whole'
  process = _start(base, f'--target={base / "target"}', f'--workdir={workdir}')
  code, out, err = binary.finish(process)
  assert (code, out) == (0, f'Report: {workdir / "report.html"}\n'), err
  return workdir


def test_a_run_leaves_what_is_promised(
  base: pathlib.Path, whole: pathlib.Path
) -> None:
  result = json.loads((whole / 'result.json').read_text())
  assert result['num_steps'] == 150
  assert result['eval_acceptance_1'] > 0.5
  config = json.loads((whole / 'config.json').read_text())
  assert config['target'] == str(base / 'target')
  assert '<svg' in (whole / 'report.html').read_text()


@pytest.mark.slow
def test_sigterm_ends_with_3_and_the_same_command_continues_the_same_run(
  base: pathlib.Path, whole: pathlib.Path
) -> None:
  workdir = base / 'stopped'
  arguments = (f'--target={base / "target"}', f'--workdir={workdir}')
  process = _start(base, *arguments)
  binary.wait_until(lambda: binary.num_lines(workdir) >= 20, process)
  process.send_signal(signal.SIGTERM)
  code, out, _ = binary.finish(process)
  assert code == 3
  assert out == 'Stopped by SIGTERM; the same command continues.\n'
  code, _, err = binary.finish(_start(base, *arguments))
  assert code == 0
  assert 'Resumed at step ' in err
  ours, theirs = (drafter_training.load(x).params for x in (workdir, whole))
  for name in ('query', 'out'):
    np.testing.assert_array_equal(
      ours['block']['attention'][name]['kernel'],
      theirs['block']['attention'][name]['kernel'],
    )


def test_a_missing_target_gives_one_line_and_code_2(base: pathlib.Path) -> None:
  workdir = base / 'refused'
  code, out, err = binary.finish(_start(base, f'--workdir={workdir}'))
  assert (code, out) == (2, '')
  assert err.splitlines() == [
    'error: --target is missing; name the folder of a training run.'
  ]


def test_a_checkpoint_of_transformers_is_a_target(base: pathlib.Path) -> None:
  run = trained_run.find(base / 'target', name='target')
  interchange.export_run(run, base / 'theirs')
  target, workdir = f'hf:{base / "theirs"}', base / 'of_theirs'
  code, _, err = binary.finish(
    _start(
      base,
      f'--target={target}',
      f'--workdir={workdir}',
      f'--config.path={base / "text"}',
      '--config.loop.num_steps=4',
    )
  )
  assert code == 0, err
  config = json.loads((workdir / 'config.json').read_text())
  assert config['target'] == target
