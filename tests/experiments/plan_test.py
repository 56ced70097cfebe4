"""Tests of the planning tool as its user runs it."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from efficient_llm.end_to_end.config import EndToEndConfig
from efficient_llm.models import transformer
from experiments import configuration
from tests import simulated_devices

_ROOT = pathlib.Path(__file__).parents[2]
_SMALL = (
  '--config=experiments/configs/pretrain_cpu.py',
  '--config.model.num_layers=2',
  '--config.model.embed_dim=64',
  '--config.model.vocab_size=320',
  '--config.data.path=/there/is/no/such/text',
)
_HAS_CUDA = all(
  # In this order: a part of what is missing raises.
  importlib.util.find_spec(name)
  for name in ('jax_cuda13_plugin', 'nvidia', 'nvidia.cudnn')
)
_HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None
_needs_libtpu = pytest.mark.skipif(
  not _HAS_LIBTPU, reason='the TPU compiler (libtpu) is not installed'
)


def _run(
  *arguments: str, num_devices: int = 8
) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'experiments.plan', *arguments],
    cwd=_ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': simulated_devices.flags(num_devices),
    },
    capture_output=True,
    text=True,
    check=False,
  )


def _bytes_by_axes(plan: dict, kind: str) -> dict[tuple[str, ...], int]:
  found: dict[tuple[str, ...], int] = {}
  for moved in plan['collectives']:
    if moved['kind'] == kind:
      axes = tuple(moved['mesh_axes'])
      sent = moved['bytes_per_device_per_step']
      found[axes] = found.get(axes, 0) + sent
  return found


@pytest.fixture(scope='module', name='plan')
def plan_fixture() -> dict:
  run = _run(
    *_SMALL,
    '--json',
    '--fast',
    '--config.mesh.data=2',
    '--config.mesh.fsdp=4',
    '--config.data.batch_size=16',
  )
  assert run.returncode == 0, run.stderr
  return json.loads(run.stdout.splitlines()[-1])


def test_the_last_line_is_json_with_what_is_promised(plan: dict) -> None:
  promised = {
    'fits',
    'peak_bytes_per_device',
    'collectives',
    'params',
    'flops_per_step',
    'step_secs_estimate',
    'assumptions',
  }
  assert promised <= plan.keys()
  assert plan['fits'] is True
  assert plan['num_devices'] == 8
  assert plan['mesh'] == {'island': 1, 'data': 2, 'fsdp': 4, 'tensor': 1}


def test_weights_are_gathered_over_fsdp_and_gradients_meet_over_data(
  plan: dict,
) -> None:
  gathered = _bytes_by_axes(plan, 'all-gather')
  # Float32 weights of the layers, forward and backward, but for a quarter.
  layers = sum(
    count
    for name, count in plan['params_by_group'].items()
    if name in ('layers/attention', 'layers/mlp')
  )
  assert gathered['fsdp',] >= layers * 4 * 3 / 4
  reduced = _bytes_by_axes(plan, 'all-reduce')
  # Each device holds a quarter of the gradients and meets one other device.
  assert reduced['data',] >= layers * 4 / 4


def test_the_table_says_that_it_fits_and_that_times_are_estimates() -> None:
  run = _run(*_SMALL, '--fast', num_devices=1)
  assert run.returncode == 0, run.stderr
  assert run.stdout.splitlines()[-1] == 'FITS'
  assert 'Time (an estimate)' in run.stdout
  assert 'nothing was measured' in run.stdout


def test_the_main_job_is_planned_stage_by_stage() -> None:
  path = 'experiments/configs/end_to_end_cpu.py:quick'
  run = _run(f'--config={path}', '--fast', '--json', num_devices=1)
  assert run.returncode == 0, run.stderr
  *table, last = run.stdout.splitlines()
  assert table[-1] == 'All: FITS'
  stages = json.loads(last)
  config = configuration.load(path, EndToEndConfig)
  assert [f'rung {n}' for n in range(1, len(config.ladder) + 1)] == [
    name for name in stages if name.startswith('rung')
  ]
  target = stages['target from nothing']
  assert target['params'] == transformer.num_params(config.target.model)
  assert target['num_steps'] == config.target.loop.num_steps
  assert stages['islands']['num_steps'] == config.islands.num_steps
  assert stages['target grown']['num_steps'] == config.growth.num_steps
  # Four islands hold four models, and what they share.
  assert (
    stages['islands']['peak_bytes_per_device']
    > 3 * stages['data-parallel']['memory']['arguments']
  )
  for name, stage in stages.items():
    # The seconds are those of so many steps, not of the run that was planned.
    assert stage['estimate']['total_secs'] == pytest.approx(
      stage['step_secs_estimate'] * stage['num_steps']
    )
    assert any(line.strip().startswith(name) for line in table)


@pytest.mark.parametrize(
  ('argument', 'remedy'),
  [
    ('--topology=v7:4x4', 'v5e:16x16'),
    ('--config.model.layers=2', 'num_layers'),
    ('--config.data.batch_size=12', 'data.batch_size=16'),
    ('--matmul_efficiency=2', 'matmul_efficiency'),
    ('--nonsense', 'nonsense'),
  ],
)
def test_bad_input_is_one_line_with_the_remedy(
  argument: str, remedy: str
) -> None:
  run = _run(*_SMALL, argument)
  assert run.returncode == 2, run.stderr
  lines = [line for line in run.stderr.splitlines() if 'error:' in line]
  assert len(lines) == 1
  assert remedy in lines[0]
  assert 'Traceback' not in run.stderr


@pytest.mark.skipif(_HAS_LIBTPU, reason='libtpu is installed')
def test_a_missing_tpu_compiler_is_one_line_with_the_remedy() -> None:
  run = _run(*_SMALL, '--topology=v5e:2x2')
  assert run.returncode == 2, run.stderr
  assert 'pip install "jax[tpu]==' in run.stderr
  assert 'Traceback' not in run.stderr


@_needs_libtpu
def test_the_train_step_compiles_for_a_tpu_that_is_not_here() -> None:
  run = _run(
    *_SMALL,
    '--json',
    '--fast',
    '--topology=v5e:2x2',
    '--config.model.dtype=bfloat16',
  )
  assert run.returncode == 0, run.stderr
  plan = json.loads(run.stdout.splitlines()[-1])
  assert plan['fits'] is True
  assert plan['attention'] == 'splash'
  assert plan['num_devices'] == 4
  assert {tuple(c['mesh_axes']) for c in plan['collectives']} == {('fsdp',)}
  assert plan['estimate']['memory_secs'] > 0


@pytest.mark.skipif(
  not _HAS_CUDA, reason='the CUDA plug-in or cuDNN is not installed'
)
def test_the_main_job_compiles_for_a_gpu_its_islands_too() -> None:
  run = _run(
    '--config=experiments/configs/end_to_end_gpu.py',
    '--topology=h100:1',
    '--fast',
    '--max_trials=0',
    num_devices=1,
  )
  assert run.returncode == 0, run.stderr
  assert run.stdout.splitlines()[-1] == 'All: FITS'


@_needs_libtpu
def test_slices_meet_over_the_network_along_the_data_axis_only() -> None:
  run = _run(
    *_SMALL,
    '--json',
    '--fast',
    '--topology=v5e:2x2,slices=2',
    '--config.mesh.data=2',
    '--config.model.dtype=bfloat16',
  )
  assert run.returncode == 0, run.stderr
  plan = json.loads(run.stdout.splitlines()[-1])
  across = [c for c in plan['collectives'] if c['crosses_network']]
  assert across
  assert {tuple(c['mesh_axes']) for c in across} == {('data',)}


@_needs_libtpu
def test_what_no_tpu_can_hold_is_an_answer_with_a_remedy() -> None:
  run = _run(
    *_SMALL,
    '--json',
    '--fast',
    '--max_trials=1',
    '--topology=v5e:2x2',
    '--config.model.num_layers=24',
    '--config.model.embed_dim=1024',
    '--config.model.max_positions=4096',
    '--config.data.sequence_length=4096',
    '--config.data.batch_size=64',
  )
  assert run.returncode == 0, run.stderr
  plan = json.loads(run.stdout.splitlines()[-1])
  assert plan['fits'] is False
  assert plan['peak_bytes_per_device'] > plan['memory']['limit']
  assert plan['remedy']['flags'][0] == '--config.model.remat=full'
