"""Tests of training with several real processes, and with eight devices."""

import json
import pathlib
import signal
import subprocess

import jax
import numpy as np
import pytest

from efficient_llm.training import metrics, saved_run
from tests import binary, simulated_devices, tiny

_NUM_STEPS = 100


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('processes')
  text = tiny.write_text(folder / 'text')
  config = (
    f'tiny.config(pathlib.Path({str(text)!r}), num_steps={_NUM_STEPS}, '
    'log_every=1, eval_every=40, every_steps=25)'
  )
  # The optimiser's default of 1e-8 would amplify what rounding leaves.
  binary.write_config(
    folder,
    f"dataclasses.replace({config}, sample_prompts=('alpha', 'beta'), "
    f'optimizer=dataclasses.replace({config}.optimizer, epsilon=1e-4))',
  )
  return folder


def _start_one(
  base: pathlib.Path, workdir: pathlib.Path, *more: str, **variables: str
) -> subprocess.Popen[str]:
  arguments = [f'--config={base / "run.py"}', f'--workdir={workdir}', *more]
  return binary.start(arguments, cache=base / 'cache', environment=variables)


def _start_two(
  base: pathlib.Path, workdir: pathlib.Path, *more: str
) -> list[subprocess.Popen[str]]:
  return binary.start_together(
    [f'--config={base / "run.py"}', f'--workdir={workdir}', *more],
    count=2,
    cache=base / 'cache',
    module='experiments.pretrain',
  )


def _stop_two(base: pathlib.Path, workdir: pathlib.Path) -> None:
  processes = _start_two(base, workdir, '--config.mesh.fsdp=2')
  binary.wait_until(lambda: binary.num_lines(workdir) >= 10, processes[0])
  processes[1].send_signal(signal.SIGTERM)
  ends = binary.finish_all(processes)
  assert [code for code, _, _ in ends] == [3, 3], ends
  says = 'Stopped by SIGTERM; the same command continues.'
  assert [says in out for _, out, _ in ends] == [True, False]


def _assert_same_to_rounding(
  workdir: pathlib.Path, other: pathlib.Path
) -> None:
  lines, others = metrics.read_metrics(workdir), metrics.read_metrics(other)
  for name in ('kind', 'step', 'tokens'):
    assert [x[name] for x in lines] == [x[name] for x in others]
  # float32 sums in another order, through a hundred updates.
  np.testing.assert_allclose(
    [x['loss'] for x in lines], [x['loss'] for x in others], rtol=1e-3
  )
  trees = [
    saved_run.restore_params(folder / 'checkpoints', None)
    for folder in (workdir, other)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), *trees)
  states = [
    json.loads(
      (folder / f'checkpoints/{_NUM_STEPS}/data_state.json').read_text()
    )
    for folder in (workdir, other)
  ]
  assert states[0] == states[1]


@pytest.fixture(scope='module')
def alone(base: pathlib.Path) -> pathlib.Path:
  """The folder of a run of one process and one device."""
  workdir = base / 'alone'
  code, _, err = binary.finish(_start_one(base, workdir))
  assert code == 0, err
  return workdir


def test_two_processes_stop_together_and_continue_to_the_result_of_one(
  base: pathlib.Path, alone: pathlib.Path
) -> None:
  workdir = base / 'two'
  _stop_two(base, workdir)
  ends = binary.finish_all(_start_two(base, workdir, '--config.mesh.fsdp=2'))
  assert [code for code, _, _ in ends] == [0, 0], ends
  says = f'Report: {workdir / "report.html"}'
  assert [says in out for _, out, _ in ends] == [True, False]
  assert 'Resumed at step' in ends[0][2]
  _assert_same_to_rounding(workdir, alone)
  result = json.loads((workdir / 'result.json').read_text())
  assert len(result['samples']) == 2
  assert result['environment']['process_count'] == 2
  assert (workdir / 'report.html').exists()


@pytest.mark.slow
def test_one_process_continues_what_two_have_saved(
  base: pathlib.Path, alone: pathlib.Path
) -> None:
  workdir = base / 'two_then_one'
  _stop_two(base, workdir)
  code, _, err = binary.finish(_start_one(base, workdir))
  assert code == 0, err
  assert 'Configuration changed since the checkpoint: mesh.fsdp' in err
  _assert_same_to_rounding(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize('axis', ['data', 'fsdp', 'tensor'])
def test_two_processes_continue_what_one_has_saved(
  base: pathlib.Path, alone: pathlib.Path, axis: str
) -> None:
  workdir = base / f'one_then_two_{axis}'
  process = _start_one(base, workdir)
  binary.wait_until(lambda: binary.num_lines(workdir) >= 10, process)
  process.send_signal(signal.SIGTERM)
  assert binary.finish(process)[0] == 3
  mesh = ['--config.mesh.fsdp=1', f'--config.mesh.{axis}=2']
  ends = binary.finish_all(_start_two(base, workdir, *mesh))
  assert [code for code, _, _ in ends] == [0, 0], ends
  _assert_same_to_rounding(workdir, alone)


@pytest.mark.slow
def test_all_processes_refuse_what_the_first_one_finds_wrong(
  base: pathlib.Path,
) -> None:
  (base / 'file').touch()
  ends = binary.finish_all(_start_two(base, base / 'file'))
  assert [code for code, _, _ in ends] == [2, 2], ends
  assert all('must be a writable folder' in err for _, _, err in ends)
  assert not any('Traceback' in err for _, _, err in ends)


@pytest.mark.slow
def test_ctrl_c_in_one_process_stops_both(base: pathlib.Path) -> None:
  workdir = base / 'interrupted'
  processes = _start_two(base, workdir, '--config.mesh.data=2')
  binary.wait_until(lambda: binary.num_lines(workdir) >= 10, processes[0])
  processes[0].send_signal(signal.SIGINT)
  ends = binary.finish_all(processes)
  assert [code for code, _, _ in ends] == [3, 3], ends


def test_eight_devices_give_the_result_of_one_and_one_continues_it(
  base: pathlib.Path, alone: pathlib.Path
) -> None:
  workdir = base / 'eight'
  process = _start_one(
    base,
    workdir,
    '--config.mesh.fsdp=4',
    '--config.mesh.tensor=2',
    XLA_FLAGS=simulated_devices.flags(),
  )
  binary.wait_until(lambda: binary.num_lines(workdir) >= 30, process)
  process.send_signal(signal.SIGTERM)
  code, _, err = binary.finish(process)
  assert code == 3, err
  assert '8 x cpu (island 1, data 1, fsdp 4, tensor 2)' in err
  code, _, err = binary.finish(_start_one(base, workdir))
  assert code == 0, err
  assert 'Resumed at step' in err
  _assert_same_to_rounding(workdir, alone)
