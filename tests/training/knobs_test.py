"""Tests of the search for what makes a run fit, without compiling."""

import dataclasses

import pytest

from efficient_llm import sharding
from efficient_llm.models import transformer
from efficient_llm.training import knobs, pretrain
from experiments import overrides

_CONFIG = pretrain.PretrainConfig(
  model=transformer.TransformerConfig(embed_dim=64, num_heads=8),
  mesh=sharding.MeshConfig(data=2, fsdp=2),
)
_SIZES = {'island': 1, 'data': 2, 'fsdp': 2, 'tensor': 1}


class Compiler:
  """Says what a configuration needs and remembers what it was asked."""

  def __init__(self, limit: int = 100) -> None:
    self.limit = limit
    self.asked: list[pretrain.PretrainConfig] = []

  def __call__(self, config: pretrain.PretrainConfig) -> knobs.Trial | None:
    self.asked.append(config)
    peak = self.peak(config)
    return knobs.Trial(peak <= self.limit, peak)

  def peak(self, config: pretrain.PretrainConfig) -> int:
    halves = [
      config.model.remat == 'full',
      config.mesh.data == 1 and config.mesh.fsdp == -1,
      config.model.dtype == 'bfloat16',
    ]
    parts = config.loop.num_microbatches * config.mesh.tensor
    return 3200 // (2 ** sum(halves) * parts)


def _find(
  compiler: Compiler,
  config: pretrain.PretrainConfig = _CONFIG,
  *,
  state_bytes: int = 1,
  max_trials: int = 20,
) -> knobs.Remedy:
  return knobs.find(
    config,
    _SIZES,
    now=knobs.Trial(False, compiler.peak(config)),
    state_bytes=state_bytes,
    limit_bytes=compiler.limit,
    compile_trial=compiler,
    max_trials=max_trials,
  )


def test_recomputation_comes_first() -> None:
  remedy = _find(Compiler(limit=1600))
  assert remedy.fits
  assert remedy.flags == ('--config.model.remat=full',)


def test_smaller_microbatches_come_next_down_to_a_row_per_device() -> None:
  compiler = Compiler(limit=1)
  _find(compiler)
  tried = [config.loop.num_microbatches for config in compiler.asked]
  # 32 rows over four devices.
  assert tried[:4] == [1, 2, 4, 8]
  assert max(tried) == 8


def test_what_helped_stays_while_the_next_knob_is_tried() -> None:
  remedy = _find(Compiler(limit=100))
  assert remedy.fits
  assert remedy.flags == (
    '--config.model.remat=full',
    '--config.loop.num_microbatches=8',
    '--config.mesh.data=1',
    '--config.mesh.fsdp=-1',
  )


def test_a_knob_that_does_not_help_is_turned_back() -> None:
  class Stubborn(Compiler):
    def peak(self, config: pretrain.PretrainConfig) -> int:
      return 50 if config.model.dtype == 'bfloat16' else 3200

  remedy = _find(Stubborn())
  assert remedy.flags == ('--config.model.dtype=bfloat16',)


def test_a_knob_that_is_turned_already_is_not_tried() -> None:
  config = dataclasses.replace(
    _CONFIG, model=dataclasses.replace(_CONFIG.model, remat='full')
  )
  compiler = Compiler(limit=1600)
  compiler.peak = lambda config: 3200 // config.loop.num_microbatches
  assert _find(compiler, config).flags == ('--config.loop.num_microbatches=2',)


def test_activations_are_left_alone_where_the_state_fills_a_device() -> None:
  compiler = Compiler(limit=100)
  # Over two shards, with gradients: 4/3 x 300 / 2 = 200.
  remedy = _find(compiler, state_bytes=300)
  assert {config.model.remat for config in compiler.asked} == {'none'}
  assert all(config.loop.num_microbatches == 1 for config in compiler.asked)
  assert '--config.mesh.fsdp=-1' in remedy.flags


def test_more_devices_are_the_last_resort() -> None:
  compiler = Compiler(limit=1)
  remedy = _find(compiler)
  assert not remedy.fits
  assert 'take about 8 devices' in remedy.reason


@pytest.mark.parametrize('max_trials', [0, 1, 3])
def test_no_more_is_compiled_than_allowed(max_trials: int) -> None:
  compiler = Compiler(limit=1)
  assert not _find(compiler, max_trials=max_trials).fits
  assert len(compiler.asked) == max_trials


def test_the_flags_make_the_configuration_that_was_compiled() -> None:
  compiler = Compiler(limit=100)
  remedy = _find(compiler)
  changes = dict(
    flag.removeprefix('--config.').split('=') for flag in remedy.flags
  )
  assert overrides.apply_overrides(_CONFIG, changes) == compiler.asked[-1]


def test_a_configuration_that_is_not_legal_is_passed_over() -> None:
  class Strict(Compiler):
    def __call__(self, config: pretrain.PretrainConfig) -> knobs.Trial | None:
      if config.loop.num_microbatches > 1:
        return None
      return super().__call__(config)

  remedy = _find(Strict(limit=800))
  assert remedy.flags == (
    '--config.model.remat=full',
    '--config.mesh.data=1',
    '--config.mesh.fsdp=-1',
  )
