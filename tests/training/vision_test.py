"""Tests of training on images: the loop, its counts and report, refusals."""

import contextlib
import dataclasses
import io
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm import sharding
from efficient_llm.models import transformer
from efficient_llm.training import (
  evaluation,
  loop,
  planner,
  pretrain,
  signals,
  topology,
  trained_run,
)
from experiments import plan_text
from tests import tiny_images

_PROGRESS = 'progress.txt'


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('vision')
  tiny_images.write_folder(folder / 'images', size=tiny_images.SIZE)
  return folder


def _config(folder: pathlib.Path, **changes: Any) -> pretrain.PretrainConfig:
  return tiny_images.config(
    folder / 'images', cache_dir=folder / 'cache', **changes
  )


@pytest.fixture(scope='module')
def whole(folder: pathlib.Path) -> loop.Outcome:
  config = _config(folder, num_steps=40, eval_every=20)
  shown = io.StringIO()
  with contextlib.redirect_stderr(shown):
    outcome = pretrain.train(config, workdir=folder / 'whole')
  (folder / _PROGRESS).write_text(shown.getvalue())
  return outcome


def test_classes_are_learned(whole: loop.Outcome) -> None:
  # One colour is brighter; chance is a third.
  assert whole.eval_metrics['accuracy'] > 0.9
  assert 'perplexity' not in whole.eval_metrics


def test_the_result_counts_images(
  whole: loop.Outcome, folder: pathlib.Path
) -> None:
  result = json.loads((folder / 'whole' / 'result.json').read_text())
  assert result['unit'] == 'images'
  assert result['num_tokens'] == 40 * 8
  model = tiny_images.MODEL
  flops = 40 * 8 * transformer.flops_per_image(model)
  assert result['flops'] == pytest.approx(flops)
  assert result['eval_accuracy'] == whole.eval_metrics['accuracy']
  assert result['data']['classes'] == 3
  assert result['samples'] == []


def test_the_report_speaks_of_images(
  whole: loop.Outcome, folder: pathlib.Path
) -> None:
  del whole
  text = (folder / 'whole' / 'report.html').read_text()
  for words in ('Validation accuracy', 'nats per image', 'images/s'):
    assert words in text
  shown = text.split('<details>')[0]
  assert 'token' not in shown


def test_the_progress_line_speaks_of_images(
  whole: loop.Outcome, folder: pathlib.Path
) -> None:
  del whole
  text = (folder / _PROGRESS).read_text()
  assert 'images/s' in text
  assert 'token' not in text


@pytest.mark.slow
def test_a_stopped_run_continues_bit_for_bit(
  whole: loop.Outcome, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = _config(folder, num_steps=40, eval_every=20)

  def is_set(self: signals.StopRequest, step: int) -> bool:
    self.signal_name = 'SIGTERM'
    return step == 23

  with monkeypatch.context() as patched:
    patched.setattr(signals.StopRequest, 'is_set', is_set)
    stopped = pretrain.train(config, workdir=folder / 'stopped')
  assert stopped.stopped_by == 'SIGTERM'
  outcome = pretrain.train(config, workdir=folder / 'stopped')
  jax.tree.map(np.testing.assert_array_equal, outcome.state, whole.state)
  assert outcome.eval_metrics == whole.eval_metrics


def test_a_checkpoint_names_its_classes(
  whole: loop.Outcome, folder: pathlib.Path
) -> None:
  del whole
  run = trained_run.find(folder / 'whole', name='small')
  assert run.model == tiny_images.MODEL
  assert run.tokenizer['classes'] == list(tiny_images.CLASSES)


def test_rows_that_fill_up_do_not_count(folder: pathlib.Path) -> None:
  """Validation is the mean over all images, however they fall into batches."""
  config = _config(folder)
  found = []
  for batch_size in (8, 32):
    data = dataclasses.replace(config.data, batch_size=batch_size)
    run = dataclasses.replace(config, data=data)
    mesh = sharding.make_mesh(run.mesh)
    program = pretrain.build(run, mesh)
    _, validation = pretrain.datasets.open_both(
      run.data, cache_dir=folder / 'cache'
    )
    assert validation is not None
    assert validation.num_sequences % batch_size
    found.append(
      evaluation.evaluate(
        validation,
        program.init_state().params,
        eval_step=program.eval_step,
        place=lambda batch: batch,
        num_batches=None,
      )
    )
  assert found[0]['loss'] == pytest.approx(found[1]['loss'], rel=1e-5)
  assert found[0]['accuracy'] == pytest.approx(found[1]['accuracy'])


def test_the_program_says_what_it_takes(folder: pathlib.Path) -> None:
  config = _config(folder)
  program = pretrain.build(config, sharding.make_mesh(config.mesh))
  dataset, _ = pretrain.datasets.open_both(
    config.data, cache_dir=folder / 'cache'
  )
  batch = dataset.batch_at(0)
  assert {
    name: (x.shape, x.dtype) for name, x in program.abstract_batch.items()
  } == {name: (x.shape, x.dtype) for name, x in batch.items()}
  params = program.init_state().params
  assert program.eval_step(params, batch).weight == 8


def test_a_plan_counts_images(folder: pathlib.Path) -> None:
  config = _config(folder)
  where = topology.load(topology.parse('local'))
  found = planner.plan(config, where, fast=True)
  assert found.tokens_per_step == 8
  assert found.flops_per_step == 8 * transformer.flops_per_image(config.model)
  text = plan_text.render(found)
  assert 'images/s' in text
  assert 'token' not in text.split('A step')[1]


@pytest.mark.parametrize(
  ('part', 'changes', 'named'),
  [
    ('model', {'vocab_size': 4}, 'vocab_size=4 must be the number of classes'),
    (
      'model',
      {'image_size': 9},
      'data.image_size=6 must be model.image_size=9',
    ),
    ('data', {'image_channels': 1}, 'data.image_channels=1 must be'),
    (
      'data',
      {
        'objective': 'masked',
        'image_size': None,
        'image_shift': 0,
      },
      'must both be of images',
    ),
    ('model', {'causal': True}, 'model.causal=True is for text'),
  ],
)
def test_data_and_models_of_two_kinds_are_refused_in_one_line(
  folder: pathlib.Path,
  tmp_path: pathlib.Path,
  part: str,
  changes: dict[str, Any],
  named: str,
) -> None:
  config = _config(folder)
  changed = dataclasses.replace(getattr(config, part), **changes)
  with pytest.raises(ValueError, match=named) as caught:
    pretrain.train(
      dataclasses.replace(config, **{part: changed}), workdir=tmp_path
    )
  assert '\n' not in str(caught.value)
