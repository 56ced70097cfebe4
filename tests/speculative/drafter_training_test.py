"""Tests of the training of a drafter: its program, its run, its refusals."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding
from efficient_llm.models import transformer
from efficient_llm.models.huggingface import shards
from efficient_llm.speculative import drafter, drafter_training, eagle
from efficient_llm.training import (
  checkpoint,
  loop,
  metrics,
  pretrain,
  signals,
)
from tests import tiny


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Holds the run of a target."""
  folder = tmp_path_factory.mktemp('drafter')
  pretrain.train(
    tiny.config(tiny.write_text(folder / 'text'), eval_every=None),
    workdir=folder / 'target',
  )
  return folder


def _config(
  target: pathlib.Path | None, **changes: Any
) -> drafter_training.DrafterConfig:
  return drafter_training.DrafterConfig(
    **{
      'target': None if target is None else str(target),
      'loss': drafter_training.DrafterLossConfig(num_passes=2, noise=0.1),
      'optimizer': optimizer_lib.OptimizerConfig(
        learning_rate=1e-2, warmup_steps=2
      ),
      'loop': loop.LoopConfig(
        num_steps=12,
        log_every=3,
        eval_every=6,
        eval_batches=2,
        tensorboard=False,
        checkpoint=checkpoint.CheckpointConfig(every_steps=4, max_to_keep=20),
      ),
      **changes,
    }
  )


@pytest.fixture(scope='module')
def whole(folder: pathlib.Path) -> loop.Outcome:
  config = _config(folder / 'target')
  return drafter_training.train(config, workdir=folder / 'whole')


@pytest.mark.slow
def test_a_run_of_eagles_form_learns_and_is_exported(
  folder: pathlib.Path, whole: loop.Outcome
) -> None:
  config = _config(folder / 'target', form='eagle')
  outcome = drafter_training.train(config, workdir=folder / 'eagle')
  records = metrics.read_metrics(folder / 'eagle', kind='train')
  assert records[-1]['loss'] < records[0]['loss']
  assert drafter_training.is_run(folder / 'eagle')
  assert not drafter_training.is_run(folder / 'target')
  eagle.export_run(folder / 'eagle', folder / 'out', engine='vllm')
  stored = shards.open_folder(folder / 'out')
  kernel = np.asarray(outcome.state.params['fc']['kernel'])
  fc = stored['fc.weight']
  np.testing.assert_array_equal(
    fc.read(0, fc.shape[0]), kernel.reshape(-1, kernel.shape[-1]).T
  )
  with pytest.raises(ValueError, match="must be of the form 'eagle'"):
    eagle.export_run(folder / 'whole', folder / 'not', engine='sglang')


def _result(workdir: pathlib.Path) -> dict[str, Any]:
  return json.loads((workdir / 'result.json').read_text())


def test_the_result_tells_of_the_run(
  whole: loop.Outcome, folder: pathlib.Path
) -> None:
  result = _result(folder / 'whole')
  assert result['num_steps'] == 12
  assert result['num_tokens'] == whole.num_tokens
  assert result['num_params'] == drafter.num_params(tiny.MODEL)
  assert result['eval_loss'] == whole.eval_metrics['loss']
  assert result['target']['step'] == 12
  for name in ('acceptance_1', 'acceptance_2', 'agreement_1', 'agreement_2'):
    assert 0 < result[f'eval_{name}'] < 1
  report = (folder / 'whole' / 'report.html').read_text()
  assert 'token 2 of a draft' in report


def test_training_raises_the_acceptance(
  whole: loop.Outcome, folder: pathlib.Path
) -> None:
  del whole
  lines = metrics.read_metrics(folder / 'whole', kind='train')
  assert lines[-1]['acceptance_1'] > lines[0]['acceptance_1']


def test_a_saved_drafter_comes_back_with_its_target_s_configuration(
  whole: loop.Outcome, folder: pathlib.Path
) -> None:
  config, params, meta = drafter_training.load(folder / 'whole')
  assert config == tiny.MODEL
  jax.tree.map(np.testing.assert_array_equal, params, whole.state.params)
  assert meta['target']['workdir'] == str(folder / 'target')
  assert meta['config']['loss']['num_passes'] == 2


def test_a_stopped_run_continues_bit_for_bit(
  whole: loop.Outcome, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  workdir, config = folder / 'stopped', _config(folder / 'target')

  def is_set(self: signals.StopRequest, step: int) -> bool:
    self.signal_name = 'SIGTERM'
    return step == 7

  with monkeypatch.context() as patched:
    patched.setattr(signals.StopRequest, 'is_set', is_set)
    stopped = drafter_training.train(config, workdir=workdir)
  assert stopped.stopped_by == 'SIGTERM'
  assert not (workdir / 'result.json').exists()
  outcome = drafter_training.train(config, workdir=workdir)
  jax.tree.map(np.testing.assert_array_equal, outcome.state, whole.state)
  assert outcome.eval_metrics == whole.eval_metrics


def test_a_run_goes_on_with_the_target_it_began_with(
  whole: loop.Outcome, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  del whole
  for name in ('target', 'whole'):
    shutil.copytree(folder / name, tmp_path / name)
  longer = tiny.config(folder / 'text/text.txt', num_steps=16, eval_every=None)
  pretrain.train(longer, workdir=tmp_path / 'target')
  loop_config = dataclasses.replace(_config(None).loop, num_steps=13)
  config = _config(tmp_path / 'target', loop=loop_config)
  drafter_training.train(config, workdir=tmp_path / 'whole')
  result = _result(tmp_path / 'whole')
  assert (result['num_steps'], result['target']['step']) == (13, 12)


def _build(
  model: transformer.TransformerConfig,
) -> drafter_training.Program:
  mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
  return drafter_training.build(_config(None), model, mesh)


def test_a_step_takes_newer_parameters_of_the_target_as_they_are() -> None:
  program = _build(tiny.SMALL_VOCAB)
  target = tiny.params(tiny.SMALL_VOCAB)
  newer = jax.tree.map(lambda x: 1.1 * x, target)
  batch = tiny.batch()
  losses = []
  for params in (target, newer, target):
    state = program.init_state(target)
    losses.append(float(program.train_step(state, batch, params)[1]['loss']))
  assert losses[0] == losses[2] != losses[1]


def test_no_parameter_of_the_target_is_compiled_in() -> None:
  program = _build(tiny.SMALL_VOCAB)
  jaxpr = jax.make_jaxpr(program.train_step)(
    program.abstract_state, tiny.batch(), program.abstract_target
  )
  assert sum(np.size(x) for x in jaxpr.consts) < tiny.SMALL_VOCAB.embed_dim


@pytest.mark.slow
def test_microbatches_change_nothing_but_rounding() -> None:
  model, states = tiny.SMALL_VOCAB, []
  mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
  for num_microbatches in (1, 4):
    config = _config(
      None,
      loss=drafter_training.DrafterLossConfig(num_passes=2),
      optimizer=optimizer_lib.OptimizerConfig(
        learning_rate=1e-3, schedule='constant', warmup_steps=0, epsilon=1e-3
      ),
      loop=loop.LoopConfig(num_microbatches=num_microbatches),
    )
    program = drafter_training.build(config, model, mesh)
    target = tiny.params(model)
    state = program.init_state(target)
    states.append(program.train_step(state, tiny.batch(), target)[0].params)
  jax.tree.map(
    # Sums of float32 in another order.
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    *states,
  )


def _refused(config: Any, workdir: pathlib.Path, expected: str) -> None:
  with pytest.raises(ValueError, match=expected) as error:
    drafter_training.train(config, workdir=workdir)
  assert '\n' not in str(error.value)


def test_a_missing_target_is_refused(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  del folder
  _refused(_config(None), tmp_path, '--target is missing')
  _refused(_config(tmp_path / 'none'), tmp_path, 'has no checkpoints')
  (tmp_path / 'empty/checkpoints').mkdir(parents=True)
  _refused(_config(tmp_path / 'empty'), tmp_path, 'must hold a checkpoint')


def test_a_bidirectional_target_is_refused(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = tiny.config(folder / 'text/text.txt', num_steps=4, eval_every=None)
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, causal=False),
    data=dataclasses.replace(config.data, objective='masked'),
  )
  pretrain.train(config, workdir=tmp_path / 'masked')
  _refused(_config(tmp_path / 'masked'), tmp_path, 'must be a causal model')


def test_a_folder_of_another_run_is_refused(
  whole: loop.Outcome, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  del whole
  target = folder / 'target'
  _refused(_config(target), target, 'holds another kind')
  other = tiny.config(folder / 'text/text.txt', eval_every=None)
  other = dataclasses.replace(other, seed=1)
  pretrain.train(other, workdir=tmp_path)
  _refused(_config(tmp_path), folder / 'whole', 'was trained for step 12 of')
  _refused(_config(folder / 'whole'), tmp_path / 'new', 'of this version')
  with pytest.raises(ValueError, match='holds another kind'):
    drafter_training.load(target)
  with pytest.raises(ValueError, match='has no checkpoint'):
    drafter_training.load(tmp_path / 'new')


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'sequence_length': 65}, 'sequence_length=65 must not exceed the 64'),
    ({'batch_size': 0}, 'batch_size=0 must be at least 1'),
    ({'path': '/nowhere/at/all'}, "'/nowhere/at/all' must"),
    (
      {'loop': loop.LoopConfig(num_microbatches=3, num_steps=200)},
      'data.batch_size=8 must be divisible by',
    ),
    ({'start': 'zeros'}, "config.start='zeros' must be one of"),
  ],
)
def test_what_does_not_fit_the_target_is_refused(
  folder: pathlib.Path,
  tmp_path: pathlib.Path,
  changes: dict[str, Any],
  expected: str,
) -> None:
  _refused(_config(folder / 'target', **changes), tmp_path, expected)
