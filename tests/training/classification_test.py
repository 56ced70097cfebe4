"""Tests of fine-tuning a grown encoder on labels: it learns and resumes."""

import dataclasses
import json
import pathlib
import random
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm import optimizer
from efficient_llm.data import labelled
from efficient_llm.ligo import config as ligo_config
from efficient_llm.ligo import train as ligo
from efficient_llm.training import (
  classification,
  classifier,
  loop,
  pretrain,
  saved_run,
  signals,
)
from experiments import runner
from tests import tiny

_ENCODER = dataclasses.replace(tiny.MODEL, causal=False)
# One label for each of two pairs of words, among others that say nothing.
_WORDS = {'greek': ('zeta', 'eta'), 'other': ('omega', 'theta')}


def _pretraining(folder: pathlib.Path) -> pretrain.PretrainConfig:
  config = tiny.config(
    folder / 'text.txt', cache_dir=folder / 'cache', eval_every=None
  )
  data = dataclasses.replace(config.data, objective='masked')
  return dataclasses.replace(config, model=_ENCODER, data=data)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with an encoder, a larger one grown of it, and labels."""
  folder = tmp_path_factory.mktemp('classification')
  tiny.write_text(folder)
  base = _pretraining(folder)
  pretrain.train(base, workdir=folder / 'encoder')
  fields = {x.name: getattr(base, x.name) for x in dataclasses.fields(base)}
  fields['model'] = dataclasses.replace(_ENCODER, num_layers=2)
  grown = ligo_config.LigoConfig(**fields, small=str(folder / 'encoder'))
  ligo.train(grown, workdir=folder / 'grown')
  rng = random.Random(0)
  lines = ['label,text']
  for _ in range(200):
    label = rng.choice(list(_WORDS))
    words = [*rng.choices(['alpha', 'beta', 'gamma'], k=3)]
    words.insert(rng.randrange(4), rng.choice(_WORDS[label]))
    lines.append(f'{label},{" ".join(words)}')
  (folder / 'labels.csv').write_text('\n'.join(lines) + '\n')
  return folder


def _config(folder: pathlib.Path, **changes: Any) -> classifier.ClassifyConfig:
  config = tiny.config(folder, num_steps=loop.LoopConfig.num_steps)
  fields = {
    'start': str(folder / 'grown'),
    'data': labelled.LabelledConfig(
      path=str(folder / 'labels.csv'),
      validation_fraction=0.2,
      sequence_length=32,
      batch_size=16,
    ),
    'num_passes': 10.0,
    'optimizer': optimizer.OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    'loop': dataclasses.replace(config.loop, eval_every=20, eval_batches=None),
    **changes,
  }
  return classifier.ClassifyConfig(**fields)


@pytest.fixture(scope='module')
def whole(folder: pathlib.Path) -> loop.Outcome:
  return classification.train(_config(folder), workdir=folder / 'whole')


def test_labels_are_learned(whole: loop.Outcome) -> None:
  # Chance is a half.
  assert whole.eval_metrics['accuracy'] > 0.9


def test_the_result_names_labels_and_where_it_began(
  whole: loop.Outcome, folder: pathlib.Path
) -> None:
  result = json.loads((folder / 'whole' / 'result.json').read_text())
  assert result['labels'] == ['greek', 'other']
  assert result['eval_accuracy'] == whole.eval_metrics['accuracy']
  assert result['unit'] == 'rows'
  num_rows, held_out = result['data']['rows'], result['validation_data']['rows']
  assert num_rows + held_out == 200
  assert result['num_steps'] == -(-10 * num_rows // 16)
  assert result['num_tokens'] == result['num_steps'] * 16
  assert result['start']['workdir'] == str(folder / 'grown')
  text = (folder / 'whole' / 'report.html').read_text()
  assert 'Validation accuracy' in text
  assert 'rows/s' in text


def test_training_begins_with_the_parameters_of_the_other_run(
  folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  begun = []

  def run(*_: Any, make_state: Any, **__: Any) -> loop.Outcome:
    begun.append(make_state())
    return loop.Outcome(begun[0], 'a test', 0.0, 0.0, {})

  monkeypatch.setattr(loop, 'run', run)
  classification.train(_config(folder), workdir=folder / 'begun')
  params = dict(begun[0].params)
  assert params.pop('head')['kernel'].shape == (16, 2)
  saved = saved_run.restore_params(folder / 'grown' / 'checkpoints', None)
  saved.pop('head', None)
  jax.tree.map(np.testing.assert_array_equal, params, saved)


@pytest.mark.slow
def test_a_stopped_run_continues_bit_for_bit(
  whole: loop.Outcome, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def is_set(self: signals.StopRequest, step: int) -> bool:
    self.signal_name = 'SIGTERM'
    return step == 23

  config, workdir = _config(folder), folder / 'stopped'
  with monkeypatch.context() as patched:
    patched.setattr(signals.StopRequest, 'is_set', is_set)
    assert classification.train(config, workdir=workdir).stopped_by == 'SIGTERM'
  outcome = classification.train(config, workdir=workdir)
  jax.tree.map(np.testing.assert_array_equal, outcome.state, whole.state)
  assert outcome.eval_metrics == whole.eval_metrics


@pytest.mark.slow
def test_a_causal_model_is_read_at_its_last_token(
  folder: pathlib.Path,
) -> None:
  text = tiny.config(folder / 'text.txt', cache_dir=folder / 'cache')
  pretrain.train(text, workdir=folder / 'causal')
  outcome = classification.train(
    _config(folder, start=str(folder / 'causal')), workdir=folder / 'of_causal'
  )
  assert outcome.eval_metrics['accuracy'] > 0.9


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'start': ''}, 'set --config.start'),
    ({'start': '/nowhere'}, 'start=/nowhere must be the folder'),
    ({'pooling': 'first'}, "pooling='first' must be one of token, mean"),
    ({'num_passes': 0.0}, 'must be positive'),
    ({'loop': loop.LoopConfig(num_steps=5)}, 'would follow from num_passes'),
  ],
)
def test_bad_settings_are_refused_in_one_line(
  folder: pathlib.Path,
  tmp_path: pathlib.Path,
  changes: dict[str, Any],
  named: str,
) -> None:
  with pytest.raises(ValueError, match=named) as caught:
    classification.train(_config(folder, **changes), workdir=tmp_path)
  assert '\n' not in str(caught.value)


def test_rows_longer_than_the_model_reads_are_refused(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = _config(folder)
  data = dataclasses.replace(config.data, sequence_length=65)
  config = dataclasses.replace(config, data=data)
  with pytest.raises(ValueError, match='exceed the 64 positions of the model'):
    classification.train(config, workdir=tmp_path)


def test_the_folder_of_another_run_is_refused(folder: pathlib.Path) -> None:
  with pytest.raises(ValueError, match='must be new or of a run that began'):
    classification.train(_config(folder), workdir=folder / 'encoder')


def test_the_papers_recipe_is_the_default() -> None:
  config = runner.resolve(
    'experiments/configs/classify.py',
    classifier.ClassifyConfig,
    {'start': 'out/ligo', 'data.path': 'labels.csv'},
  )
  assert isinstance(config, classifier.ClassifyConfig)
  assert (config.num_passes, config.data.batch_size) == (3.0, 32)
  assert config.optimizer.learning_rate == 1e-4
  schedule = optimizer.make_schedule(config.optimizer, num_steps=100)
  assert [float(schedule(x)) for x in (0, 50, 100)] == pytest.approx(
    [1e-4, 5e-5, 0.0]
  )
