"""Tests of pre-training in one process: the program, its data, its result."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from efficient_llm import sharding
from efficient_llm.data import tokenizer
from efficient_llm.models import sampling
from efficient_llm.training import (
  batch_layout,
  loop,
  metrics,
  pretrain,
  samples,
  signals,
)
from tests import tiny


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('pretrain')
  tiny.write_text(folder)
  return folder


def _config(folder: pathlib.Path, **changes: Any) -> pretrain.PretrainConfig:
  config = tiny.config(
    folder / 'text.txt', cache_dir=folder / 'cache', **changes
  )
  return dataclasses.replace(config, sample_prompts=('alpha', 'beta gamma'))


@pytest.fixture(scope='module')
def whole(folder: pathlib.Path) -> loop.Outcome:
  return pretrain.train(_config(folder), workdir=folder / 'whole')


def _result(workdir: pathlib.Path) -> dict[str, Any]:
  return json.loads((workdir / 'result.json').read_text())


def test_the_result_tells_of_the_run(
  whole: loop.Outcome, folder: pathlib.Path
) -> None:
  result = _result(folder / 'whole')
  assert result['num_steps'] == 12
  assert result['num_tokens'] == whole.num_tokens
  assert result['eval_loss'] == whole.eval_metrics['loss']
  assert result['bits_per_byte'] == whole.eval_metrics['bits_per_byte']
  assert result['flops'] > 6 * result['num_params'] * result['num_tokens'] / 4
  assert result['config']['loop']['num_steps'] == 12
  assert [x['prompt'] for x in result['samples']] == ['alpha', 'beta gamma']


def test_a_stopped_run_writes_no_result_and_continues_bit_for_bit(
  whole: loop.Outcome, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  workdir = folder / 'stopped'

  def is_set(self: signals.StopRequest, step: int) -> bool:
    self.signal_name = 'SIGTERM'
    return step == 7

  with monkeypatch.context() as patched:
    patched.setattr(signals.StopRequest, 'is_set', is_set)
    stopped = pretrain.train(_config(folder), workdir=workdir)
  assert stopped.stopped_by == 'SIGTERM'
  assert not (workdir / 'result.json').exists()
  outcome = pretrain.train(_config(folder), workdir=workdir)
  jax.tree.map(np.testing.assert_array_equal, outcome.state, whole.state)
  assert outcome.eval_metrics == whole.eval_metrics
  assert _result(workdir)['samples'] == _result(folder / 'whole')['samples']


def test_a_run_goes_on_from_another_one_s_parameters(
  whole: loop.Outcome, folder: pathlib.Path
) -> None:
  config = dataclasses.replace(
    _config(folder),
    start=str(folder / 'whole'),
    loop=dataclasses.replace(
      _config(folder).loop, num_steps=3, eval_every=None, eval_first=True
    ),
  )
  pretrain.train(config, workdir=folder / 'started')
  first, last = metrics.read_metrics(folder / 'started', kind='eval')
  assert first['loss'] == pytest.approx(whole.eval_metrics['loss'], abs=1e-5)
  assert last['loss'] != first['loss']


def test_another_model_is_no_start(folder: pathlib.Path) -> None:
  config = _config(folder)
  model = dataclasses.replace(config.model, num_layers=2)
  for start, message in (
    (folder / 'whole', 'must be of the same model'),
    (folder / 'nothing', 'has no checkpoints'),
  ):
    with pytest.raises(ValueError, match=message):
      pretrain.train(
        dataclasses.replace(config, model=model, start=str(start)),
        workdir=folder / 'refused',
      )


def test_without_a_validation_split_nothing_is_evaluated(
  folder: pathlib.Path,
) -> None:
  config = _config(folder)
  data = dataclasses.replace(config.data, validation_fraction=0.0)
  config = dataclasses.replace(config, data=data, sample_prompts=())
  outcome = pretrain.train(config, workdir=folder / 'unevaluated')
  assert outcome.eval_metrics == {}
  assert 'eval_loss' not in _result(folder / 'unevaluated')


def test_masked_training_runs_to_its_end(folder: pathlib.Path) -> None:
  config = _config(folder, eval_every=None)
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, causal=False),
    data=dataclasses.replace(config.data, objective='masked'),
  )
  outcome = pretrain.train(config, workdir=folder / 'masked')
  assert np.isfinite(outcome.eval_metrics['loss'])
  result = _result(folder / 'masked')
  assert result['samples'] == []
  assert 'bits_per_byte' not in result


def test_the_program_says_shape_and_place_of_what_it_takes(
  folder: pathlib.Path,
) -> None:
  config = _config(folder)
  mesh = sharding.make_mesh(config.mesh)
  program = pretrain.build(config, mesh)
  with jax.set_mesh(mesh):
    step, metrics = jax.eval_shape(
      program.train_step, program.abstract_state, program.abstract_batch
    )
  assert jax.tree.map(lambda x: x.shape, step) == jax.tree.map(
    lambda x: x.shape, program.abstract_state
  )
  assert metrics['loss'].shape == ()


class _Device:
  def __init__(self, process_index: int) -> None:
    self.process_index = process_index


def _layout(
  monkeypatch: pytest.MonkeyPatch,
  rows: dict[_Device, tuple[slice, ...]],
  process: int,
) -> tuple[int, int]:
  mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
  where = NamedSharding(mesh, PartitionSpec())
  monkeypatch.setattr(
    NamedSharding, 'devices_indices_map', lambda *_: rows, raising=False
  )
  monkeypatch.setattr(jax, 'process_index', lambda: process)
  return batch_layout.process_share(where, 8)


@pytest.mark.parametrize('process', [0, 1])
def test_processes_load_the_rows_of_their_devices(
  monkeypatch: pytest.MonkeyPatch, process: int
) -> None:
  rows = {_Device(i // 2): (slice(2 * i, 2 * i + 2),) for i in range(4)}
  assert _layout(monkeypatch, rows, process) == (process, 2)


@pytest.mark.parametrize('process', [0, 1])
def test_processes_that_share_every_matrix_product_load_the_same_rows(
  monkeypatch: pytest.MonkeyPatch, process: int
) -> None:
  rows = {_Device(i): (slice(None),) for i in range(2)}
  assert _layout(monkeypatch, rows, process) == (0, 1)


def test_rows_that_do_not_follow_each_other_are_refused(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  rows = {_Device(i % 2): (slice(2 * i, 2 * i + 2),) for i in range(4)}
  with pytest.raises(ValueError, match='rows that follow each other'):
    _layout(monkeypatch, rows, 0)


def test_prompts_are_padded_on_the_right_and_keep_their_lengths() -> None:
  prompts = samples.encode(
    ['a', 'abc'],
    tokenizer.load('bytes'),
    tiny.MODEL,
    sampling.SamplingConfig(max_new_tokens=4),
  )
  assert prompts is not None
  lengths = prompts.lengths_B
  assert lengths[1] - lengths[0] == 2
  assert prompts.tokens_BP.shape == (2, lengths[1])
  assert (prompts.tokens_BP[0, lengths[0] :] == 0).all()


def test_a_bidirectional_model_draws_no_samples() -> None:
  model = dataclasses.replace(tiny.MODEL, causal=False)
  encoder = tokenizer.load('bytes')
  config = sampling.SamplingConfig()
  assert samples.encode(['a'], encoder, model, config) is None


def test_stop_tokens_of_the_configuration_end_samples_too(
  whole: loop.Outcome,
) -> None:
  encoder = tokenizer.load('bytes')
  # Every token stops, so that every sample is one token long.
  config = sampling.SamplingConfig(
    max_new_tokens=6, stop_tokens=tuple(range(tiny.MODEL.vocab_size))
  )
  prompts = samples.encode(['alpha'], encoder, tiny.MODEL, config)
  mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
  drawn = samples.draw(
    prompts,
    whole.state.params,
    model=tiny.MODEL,
    config=config,
    tokenizer=encoder,
    mesh=mesh,
    seed=0,
  )
  assert len(drawn[0]['text']) <= 1


@pytest.mark.parametrize(
  ('group', 'changes', 'expected'),
  [
    ('data', {'sequence_length': 128}, 'must not exceed model.max_positions'),
    ('loop', {'num_microbatches': 3}, 'loop.num_microbatches=3'),
    ('data', {'objective': 'masked'}, 'needs data.objective=causal'),
    ('model', {'causal': False}, 'needs data.objective=masked'),
    ('loop', {'num_steps': 2}, 'optimizer.warmup_steps=2 must be below'),
  ],
)
def test_rules_across_groups_are_checked(
  folder: pathlib.Path, group: str, changes: dict[str, Any], expected: str
) -> None:
  config = _config(folder)
  part = dataclasses.replace(getattr(config, group), **changes)
  config = dataclasses.replace(config, **{group: part})
  with pytest.raises(ValueError, match=expected) as error:
    config.validate()
  assert '\n' not in str(error.value)
