"""Tests of the pre-training binary in real processes."""

import json
import pathlib
import signal
import subprocess

import numpy as np
import pytest

from efficient_llm.training import metrics, saved_run
from tests import binary, tiny

_CLOCK = ('time', 'step_secs', 'tokens_per_sec', 'mfu')


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with a configuration of a run long enough to be stopped."""
  folder = tmp_path_factory.mktemp('pretrain')
  text = tiny.write_text(folder / 'text')
  binary.write_config(
    folder,
    f'dataclasses.replace(tiny.config(pathlib.Path({str(text)!r}), '
    'num_steps=150, log_every=1, eval_every=60, every_steps=50), '
    "sample_prompts=('alpha', 'beta gamma'))",
  )
  return folder


def _start(
  base: pathlib.Path, workdir: pathlib.Path, *more: str
) -> subprocess.Popen[str]:
  config = f'--config={base / "run.py"}'
  return binary.start(
    [config, f'--workdir={workdir}', *more], cache=base / 'cache'
  )


@pytest.fixture(scope='module')
def whole(base: pathlib.Path) -> pathlib.Path:
  """The folder of a run that nothing interrupts."""
  workdir = base / 'whole'
  code, out, err = binary.finish(_start(base, workdir))
  assert (code, out) == (0, f'Report: {workdir / "report.html"}\n'), err
  return workdir


def _lines(workdir: pathlib.Path) -> list[dict[str, object]]:
  return [
    {name: value for name, value in line.items() if name not in _CLOCK}
    for line in metrics.read_metrics(workdir)
  ]


def _assert_same_params(one: pathlib.Path, other: pathlib.Path) -> None:
  leaves = [
    json.loads((folder / 'checkpoints/150/MANIFEST.json').read_text())
    for folder in (one, other)
  ]
  assert leaves[0]['leaves'] == leaves[1]['leaves']
  trees = [
    saved_run.restore_params(folder / 'checkpoints', None, step=150)
    for folder in (one, other)
  ]
  _assert_equal(*trees)


def _assert_equal(tree: dict, other: dict) -> None:
  assert tree.keys() == other.keys()
  for name, value in tree.items():
    if isinstance(value, dict):
      _assert_equal(value, other[name])
    else:
      np.testing.assert_array_equal(value, other[name])


def test_a_run_leaves_what_is_promised(whole: pathlib.Path) -> None:
  result = json.loads((whole / 'result.json').read_text())
  assert result['num_steps'] == 150
  assert [x['prompt'] for x in result['samples']] == ['alpha', 'beta gamma']
  assert result['eval_loss'] < 3
  assert result['num_tokens'] == _lines(whole)[-1]['tokens']
  assert (whole / 'config.json').exists()
  assert '<svg' in (whole / 'report.html').read_text()
  assert [x['step'] for x in metrics.read_metrics(whole, kind='eval')] == [
    60, 120, 150
  ]  # fmt: skip


def test_sigterm_ends_with_3_and_the_same_command_continues_the_same_run(
  base: pathlib.Path, whole: pathlib.Path
) -> None:
  workdir = base / 'stopped'
  process = _start(base, workdir)
  binary.wait_until(lambda: binary.num_lines(workdir) >= 20, process)
  process.send_signal(signal.SIGTERM)
  code, out, _ = binary.finish(process)
  assert code == 3
  assert out == 'Stopped by SIGTERM; the same command continues.\n'
  code, _, err = binary.finish(_start(base, workdir))
  assert code == 0
  assert 'Resumed at step ' in err
  assert _lines(workdir) == _lines(whole)
  _assert_same_params(workdir, whole)


@pytest.mark.slow
def test_kill_9_loses_no_more_than_the_steps_since_the_last_checkpoint(
  base: pathlib.Path, whole: pathlib.Path
) -> None:
  workdir = base / 'killed'
  process = _start(base, workdir)
  first = workdir / 'checkpoints' / '50'
  binary.wait_until(first.exists, process)
  process.kill()
  binary.finish(process)
  code, _, err = binary.finish(_start(base, workdir))
  assert code == 0
  assert 'Resumed at step 50 of 150; next example: 400.' in err
  assert _lines(workdir) == _lines(whole)
  _assert_same_params(workdir, whole)


def test_a_finished_run_started_again_only_writes_its_report_anew(
  whole: pathlib.Path, base: pathlib.Path
) -> None:
  lines = (whole / 'metrics.jsonl').read_bytes()
  before = json.loads((whole / 'result.json').read_text())
  (whole / 'report.html').unlink()
  assert binary.finish(_start(base, whole))[0] == 0
  after = json.loads((whole / 'result.json').read_text())
  assert (whole / 'metrics.jsonl').read_bytes() == lines
  assert (whole / 'report.html').exists()
  assert {**after, 'finished': ''} == {**before, 'finished': ''}


def test_bad_input_gives_one_line_and_code_2(base: pathlib.Path) -> None:
  workdir = base / 'refused'
  process = _start(base, workdir, '--config.model.num_layer=3')
  code, out, err = binary.finish(process)
  assert (code, out) == (2, '')
  assert len(err.splitlines()) == 1
  assert err.startswith('error: --config.model.num_layer is not a field')
  assert 'did you mean model.num_layers or' in err
  assert not workdir.exists()


@pytest.mark.slow
def test_a_diverging_run_ends_with_1_and_one_line(base: pathlib.Path) -> None:
  process = _start(
    base,
    base / 'diverging',
    '--config.optimizer.learning_rate=1e30',
    '--config.optimizer.clip_norm=none',
  )
  code, out, err = binary.finish(process)
  assert (code, out) == (1, '')
  assert err.splitlines()[-1].startswith('error: loss=')
  assert 'there is no earlier checkpoint' in err
  assert 'Traceback' not in err


def test_a_disk_that_fills_up_ends_with_2_and_one_line(
  base: pathlib.Path,
) -> None:
  process = binary.start(
    [
      f'--config={base / "run.py"}',
      f'--workdir={base / "full"}',
      f'--config.data.cache_dir={base / "tokens"}',
      # Its table of embeddings alone needs more than a file may hold, and the
      # text less.
      '--config.model.embed_dim=64',
    ],
    cache=base / 'cache',
    largest_file=40_000,
  )
  code, out, err = binary.finish(process)
  assert (code, out) == (2, ''), err
  errors = [line for line in err.splitlines() if line.startswith('error: ')]
  assert len(errors) == 1
  assert err.splitlines()[-1] == errors[0]
  assert 'checkpoint step=50 could not be saved' in errors[0]
  assert 'Traceback' not in err


@pytest.mark.slow
def test_print_config_prints_what_a_run_would_write(
  base: pathlib.Path,
) -> None:
  process = _start(
    base, base / 'printed', '--print_config', '--config.seed=1e3'
  )
  code, out, _ = binary.finish(process)
  assert code == 0
  assert json.loads(out)['seed'] == 1000
  assert not (base / 'printed').exists()
