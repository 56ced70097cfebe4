"""Tests of plans against the real program on the local devices."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from efficient_llm import sharding
from efficient_llm.models import transformer
from efficient_llm.training import (
  ahead_of_time,
  planner,
  pretrain,
  strict_json,
  topology,
)
from tests import tiny

# Activations outweigh the state, so that knobs for them matter.
_MODEL = dataclasses.replace(tiny.MODEL, num_layers=4)


@functools.cache
def _config() -> pretrain.PretrainConfig:
  config = tiny.config(pathlib.Path('there/is/no/such/text'))
  return dataclasses.replace(
    config,
    model=_MODEL,
    data=dataclasses.replace(config.data, batch_size=64, sequence_length=64),
    mesh=sharding.MeshConfig(data=1, fsdp=-1),
  )


def _peak(plan: planner.Plan) -> int:
  assert plan.peak_bytes_per_device is not None
  return plan.peak_bytes_per_device


@functools.cache
def _here() -> topology.Topology:
  return topology.load(topology.parse('local'))


@functools.cache
def _plan() -> planner.Plan:
  return planner.plan(_config(), _here())


def _program() -> pretrain.Program:
  mesh = sharding.make_mesh(_config().mesh)
  return pretrain.build(_config(), mesh)


def _arguments(program: pretrain.Program) -> tuple:
  batch = {
    name: np.ones(leaf.shape, leaf.dtype)
    for name, leaf in program.abstract_batch.items()
  }
  placed = sharding.to_global(batch, program.batch_sharding)
  return program.init_state(), placed


def test_no_data_is_opened() -> None:
  assert not pathlib.Path(_config().data.path).exists()
  assert _plan().fits


def test_planned_arguments_are_the_bytes_of_the_real_arrays() -> None:
  program = _program()
  real = sum(
    sum(shard.data.nbytes for shard in leaf.addressable_shards)
    for leaf in jax.tree.leaves(_arguments(program))
  )
  num_devices = len(_here().devices)
  assert _plan().memory.arguments == real // num_devices
  assert ahead_of_time.argument_bytes(program) == real // num_devices


def test_planned_memory_is_that_of_the_step_that_runs() -> None:
  program = _program()
  with jax.set_mesh(program.mesh):
    lowered = program.train_step.lower(*_arguments(program))
  found = lowered.compile().memory_analysis()
  memory = _plan().memory
  assert memory.arguments == found.argument_size_in_bytes
  assert memory.temporaries == found.temp_size_in_bytes
  assert memory.peak == sum(
    part or 0
    for part in (
      memory.arguments,
      memory.temporaries,
      memory.results,
      memory.code,
    )
  )


def test_the_planned_peak_is_what_the_device_reports() -> None:
  statistics = jax.devices()[0].memory_stats()
  if not statistics or 'peak_bytes_in_use' not in statistics:
    pytest.skip('this device does not report its peak memory')
  # A large batch, so that nothing else on the device counts.
  config = dataclasses.replace(
    _config(), data=dataclasses.replace(_config().data, batch_size=4096)
  )
  predicted = planner.plan(config, _here()).peak_bytes_per_device
  program = pretrain.build(config, sharding.make_mesh(config.mesh))
  with jax.set_mesh(program.mesh):
    jax.block_until_ready(program.train_step(*_arguments(program)))
  measured = jax.devices()[0].memory_stats()['peak_bytes_in_use']
  assert predicted == pytest.approx(measured, rel=0.1)


def test_counts_follow_from_the_configuration() -> None:
  plan, config = _plan(), _config()
  assert plan.num_params == transformer.num_params(config.model)
  assert sum(plan.params.values()) == plan.num_params
  assert plan.tokens_per_step == 64 * 64
  per_token = transformer.flops_per_token(config.model, num_tokens=64)
  assert plan.flops_per_step == pytest.approx(64 * 64 * per_token)
  # Parameters and two moments, and a few counters and a key.
  state = 12 * plan.num_params
  assert state < plan.checkpoint_bytes < state + 200


def test_a_plan_is_strict_json() -> None:
  data = json.loads(strict_json.to_json(planner.as_dict(_plan())))
  assert data['params'] == _plan().num_params
  assert data['fits'] is True
  assert data['peak_bytes_per_device'] == _plan().peak_bytes_per_device
  assert data['step_secs_estimate'] > 0
  assert data['assumptions']


def test_recomputation_is_the_first_knob_where_it_is_enough() -> None:
  model = dataclasses.replace(_MODEL, remat='full')
  recomputing = planner.plan(
    dataclasses.replace(_config(), model=model), _here()
  )
  peaks = [_peak(_plan()), _peak(recomputing)]
  assert peaks[1] < peaks[0]
  between = dataclasses.replace(
    _here(), memory_limit_bytes=sum(peaks) // len(peaks)
  )
  plan = planner.plan(_config(), between, max_trials=1)
  assert plan.fits is False
  assert plan.remedy is not None
  assert plan.remedy.flags == ('--config.model.remat=full',)
  assert plan.remedy.fits


def test_without_a_known_limit_nothing_is_said_about_fitting() -> None:
  unlimited = dataclasses.replace(_here(), memory_limit_bytes=None)
  plan = planner.plan(_config(), unlimited, fast=True)
  assert plan.fits is None
  assert any('without optimisation' in text for text in plan.assumptions)


@dataclasses.dataclass
class Failing:
  """A train step whose compilation fails."""

  message: str

  def trace(self, *arguments: object) -> None:
    del arguments
    raise jax.errors.JaxRuntimeError(self.message)


def _compile_failing(message: str) -> ahead_of_time.Compiled:
  program = dataclasses.replace(_program(), train_step=Failing(message))
  return ahead_of_time.compile_step(program, _here(), fast=False)


@pytest.mark.parametrize(
  ('message', 'peak_gib'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
      'for HLO temporaries (149.06G) exceeds available HBM (15.75G).',
      149.06,
    ),
    (
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nUsed 34.57G '
      'of 15.75G hbm. Exceeded hbm capacity by 18.83G.',
      34.57,
    ),
  ],
)
def test_running_out_of_memory_in_the_compiler_is_an_answer(
  message: str, peak_gib: float
) -> None:
  compiled = _compile_failing(message)
  assert compiled.fits is False
  assert compiled.memory.peak == pytest.approx(peak_gib * 2**30)
  assert compiled.memory.arguments == _plan().memory.arguments


def test_any_other_failure_of_the_compiler_stays_one() -> None:
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    _compile_failing('INTERNAL: a defect')


def test_a_missing_library_is_named_with_its_remedy() -> None:
  with pytest.raises(ValueError, match='pip install nvidia-cudnn'):
    _compile_failing('cuDNN not found.')


def test_a_mesh_that_does_not_cut_the_model_is_refused() -> None:
  config = dataclasses.replace(
    _config(), mesh=sharding.MeshConfig(fsdp=3 * len(_here().devices))
  )
  with pytest.raises(ValueError, match='must multiply'):
    planner.plan(config, _here())
