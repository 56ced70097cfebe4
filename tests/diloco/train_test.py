"""Tests of runs on islands: against plain training, crashes, restarts."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm import optimizer, sharding
from efficient_llm.diloco import (
  compression,
  fragments,
  mesh,
  outer,
  train,
  variants,
)
from efficient_llm.diloco.config import DilocoConfig, MembershipConfig
from efficient_llm.models.huggingface import export
from efficient_llm.training import loop, metrics, pretrain, saved_run
from tests import tiny
from tests.diloco import islands

_AVERAGING = outer.OuterConfig(learning_rate=1.0, momentum=0.0)
_CLOCK = {'time', 'step_secs', 'tokens_per_sec', 'mfu'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('islands')
  tiny.write_text(folder)
  return folder


def _config(folder: pathlib.Path, **changes: Any) -> DilocoConfig:
  return islands.config(
    folder / 'text.txt', cache_dir=folder / 'cache', **changes
  )


def _hard(folder: pathlib.Path) -> DilocoConfig:
  """All that has state: fragments under way, residuals, drops, absence."""
  return _config(
    folder,
    model=dataclasses.replace(tiny.MODEL, num_layers=2),
    fragments=fragments.FragmentConfig(2, overlap_steps=1, mixing=0.5),
    compression=compression.CompressionConfig('int4'),
    membership=MembershipConfig(drop_probability=0.3, absences=('1:5:6',)),
  )


@pytest.fixture(scope='module')
def whole(folder: pathlib.Path) -> loop.Outcome:
  return train.train(_hard(folder), workdir=folder / 'whole')


def _lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
  return [
    {name: value for name, value in line.items() if name not in _CLOCK}
    for line in metrics.read_metrics(workdir)
  ]


def _assert_same(one: Any, other: Any) -> None:
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.usefixtures('optimized')
def test_one_island_averaged_is_plain_training_to_the_last_bit(
  folder: pathlib.Path,
) -> None:
  config = _config(folder, islands=1, outer=_AVERAGING)
  ours = train.train(config, workdir=folder / 'one')
  plain = pretrain.train(
    tiny.config(folder / 'text.txt', cache_dir=folder / 'cache'),
    workdir=folder / 'plain',
  )
  _assert_same(ours.state.params, plain.state.params)
  assert ours.eval_metrics == plain.eval_metrics
  assert ours.num_tokens == plain.num_tokens


def test_islands_start_from_another_run(folder: pathlib.Path) -> None:
  plain = pretrain.train(
    tiny.config(folder / 'text.txt', cache_dir=folder / 'cache'),
    workdir=folder / 'start',
  )
  config = _config(folder, start=str(folder / 'start'), method='eager')
  program = mesh.build(config, sharding.make_mesh(config.mesh))
  state = train.first_state(config, program)
  _assert_same(state.params, plain.state.params)
  for of_islands in (state.islands.params, state.anchors):
    for m in range(2):
      own = jax.tree.map(lambda x, m=m: x[m], of_islands)
      _assert_same(own, plain.state.params)
  moments = jax.tree.leaves(state.islands.opt_state)
  assert not any(np.asarray(x).any() for x in moments)


def test_islands_start_from_a_folder_of_transformers(
  folder: pathlib.Path,
) -> None:
  params = tiny.params(tiny.MODEL)
  export.write(folder / 'theirs', tiny.MODEL, params)
  config = _config(folder, start=f'hf:{folder / "theirs"}')
  state = train.first_state(
    config, mesh.build(config, sharding.make_mesh(config.mesh))
  )
  _assert_same(state.params, params)


def test_a_start_that_is_none_is_refused(folder: pathlib.Path) -> None:
  config = _config(folder, start=str(folder / 'nowhere'))
  with pytest.raises(
    ValueError, match='must be the folder of a pre-training run'
  ):
    train.train(config, workdir=folder / 'never')


@pytest.mark.slow
def test_sgd_averaged_at_every_step_is_data_parallel(
  folder: pathlib.Path,
) -> None:
  sgd = optimizer.OptimizerConfig(
    'sgd', learning_rate=0.5, warmup_steps=2, clip_norm=None
  )
  config = _config(folder, optimizer=sgd, outer=_AVERAGING)
  both = dataclasses.replace(
    config, data=dataclasses.replace(config.data, batch_size=4)
  )
  both = dataclasses.replace(both, sync_period=1)
  ours = train.train(both, workdir=folder / 'every_step')
  one = dataclasses.replace(config, islands=1)
  parallel = train.train(one, workdir=folder / 'parallel')
  jax.tree.map(
    # Gradients are summed in another order.
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    ours.state.params,
    parallel.state.params,
  )
  start = _start_params(one)
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), start, ours.state.params
  )
  assert max(jax.tree.leaves(moved)) > 1e-2


def _start_params(config: DilocoConfig) -> Any:
  """The parameters of step 0."""
  program = mesh.build(config, sharding.make_mesh(config.mesh))
  return program.init_state().params


def test_a_run_writes_what_islands_did(
  whole: loop.Outcome, folder: pathlib.Path
) -> None:
  result = json.loads((folder / 'whole' / 'result.json').read_text())
  assert result['num_steps'] == 12
  assert result['islands'] == 2
  assert result['num_tokens'] == whole.num_tokens
  sent = int(np.dot(whole.state.versions_P, _sent_bytes(folder)))
  assert result['sent_bytes_per_island'] == sent
  names = {name for line in _lines(folder / 'whole') for name in line}
  for m in range(2):
    assert {
      f'island_{m}/loss',
      f'island_{m}/outer_gradient_norm',
      f'island_{m}/outer_gradient_cosine',
    } <= names
  report = (folder / 'whole' / 'report.html').read_text()
  assert 'Outer gradients by island' in report


def _sent_bytes(folder: pathlib.Path) -> tuple[int, ...]:
  config = _hard(folder)
  return mesh.build(config, sharding.make_mesh(config.mesh)).sent_bytes


class _CrashError(Exception):
  pass


def test_a_crash_between_inner_and_outer_step_loses_and_repeats_nothing(
  whole: loop.Outcome, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  workdir = folder / 'crashed'
  step = mesh.OuterPrograms.__call__
  calls = []

  def crash(self: Any, state: Any, event: Any) -> Any:
    calls.append(event)
    if len(calls) == 9:
      raise _CrashError
    return step(self, state, event)

  with monkeypatch.context() as patched:
    patched.setattr(mesh.OuterPrograms, '__call__', crash)
    with pytest.raises(_CrashError):
      train.train(_hard(folder), workdir=workdir)
  steps = [line['step'] for line in _lines(workdir)]
  assert 3 <= max(steps) < 12
  outcome = train.train(_hard(folder), workdir=workdir)
  _assert_same(outcome.state, whole.state)
  assert _lines(workdir) == _lines(folder / 'whole')


@pytest.mark.slow
@pytest.mark.parametrize('method', ['eager', 'delayed', 'noloco'])
def test_other_methods_resume_to_the_same_bits_too(
  folder: pathlib.Path, method: Any
) -> None:
  config = _config(folder, method=method, islands=3)
  straight = train.train(config, workdir=folder / method)
  workdir = folder / f'{method}_again'
  half = dataclasses.replace(config.loop, eval_every=None)
  saved_run.clone(
    folder / method / 'checkpoints', workdir / 'checkpoints', step=8
  )
  outcome = train.train(dataclasses.replace(config, loop=half), workdir=workdir)
  _assert_same(outcome.state, straight.state)


@pytest.mark.parametrize('number', [1, 3])
@pytest.mark.slow
def test_islands_may_change_in_number_at_a_restart(
  folder: pathlib.Path, whole: loop.Outcome, number: int
) -> None:
  workdir = folder / f'changed_{number}'
  saved_run.clone(
    folder / 'whole' / 'checkpoints', workdir / 'checkpoints', step=8
  )
  config = dataclasses.replace(
    _hard(folder), islands=number, membership=MembershipConfig()
  )
  outcome = train.train(config, workdir=workdir)
  assert outcome.state.tokens_PM.shape == (2, number)
  assert np.isfinite(outcome.eval_metrics['loss'])
  assert abs(outcome.eval_metrics['loss'] - whole.eval_metrics['loss']) < 0.5
  # And again from there, with no change.
  again = train.train(config, workdir=workdir)
  _assert_same(again.state, outcome.state)


def test_a_checkpoint_without_islands_is_refused(folder: pathlib.Path) -> None:
  workdir = folder / 'not_islands'
  plain = tiny.config(folder / 'text.txt', cache_dir=folder / 'cache')
  pretrain.train(plain, workdir=workdir)
  with pytest.raises(ValueError, match='is of another model'):
    train.train(_config(folder), workdir=workdir)


def test_islands_that_devices_cannot_share_are_refused(
  folder: pathlib.Path,
) -> None:
  config = _config(folder, islands=3)
  devices = [*jax.devices()] * 2
  with pytest.raises(ValueError, match='islands=3 must be divisible by the 2'):
    mesh.build(config, sharding.make_mesh(config.mesh, devices=devices))


@pytest.mark.slow
@pytest.mark.parametrize('name', variants.NAMES)
def test_every_variant_learns(folder: pathlib.Path, name: str) -> None:
  config = _config(
    folder,
    loop={'num_steps': 30},
    sync_period=5,
    model=dataclasses.replace(tiny.MODEL, num_layers=2),
  )
  config = variants.apply(name, config)
  outcome = train.train(config, workdir=folder / f'variant_{name}')
  # Of 320 tokens some 20 occur: knowing that alone is below 4 nats.
  assert outcome.eval_metrics['loss'] < 4
