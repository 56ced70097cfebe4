"""The papers' pairs, from nothing to a grown model, at reduced width."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from efficient_llm.ligo import train
from efficient_llm.ligo.config import LigoConfig
from efficient_llm.models.config import TransformerConfig
from efficient_llm.training import loop, pretrain
from efficient_llm.training.config import PretrainConfig
from experiments import configuration
from tests import tiny, tiny_images

_FILE = 'experiments/configs/ligo_papers.py'

_PAIRS = [
  pytest.param('bert_small', 'bert_small_base', marks=pytest.mark.slow),
  pytest.param('gpt2', 'gpt2_medium', marks=pytest.mark.slow),
  # As the first, with other sizes and without token types.
  pytest.param('bert_base', 'bert_base_large', marks=pytest.mark.slow),
  pytest.param('roberta_small', 'roberta_small_base', marks=pytest.mark.slow),
  pytest.param('cait_xs24', 'cait_xs24_s24', marks=pytest.mark.slow),
  pytest.param('deit_small', 'deit_small_base', marks=pytest.mark.slow),
]


def _narrow(model: TransformerConfig) -> TransformerConfig:
  """A sixteenth of the width and a third of the depth."""
  if model.reads_images:
    return dataclasses.replace(
      model,
      num_layers=model.num_layers // 6,
      embed_dim=model.embed_dim // 12,
      head_dim=4,
      vocab_size=len(tiny_images.CLASSES),
      patch_size=3,
      image_size=tiny_images.SIZE,
      dtype='float32',
    )
  return dataclasses.replace(
    model,
    num_layers=model.num_layers // 3,
    embed_dim=model.embed_dim // 16,
    head_dim=4,
    vocab_size=320,
    max_positions=64,
    dtype='float32',
  )


def _short(config: Any, folder: pathlib.Path) -> Any:
  of_kind: dict[str, Any] = {
    'path': str(folder / 'text.txt'),
    'sequence_length': 32,
  }
  if config.model.reads_images:
    of_kind = {
      'path': str(folder / 'images'),
      'image_size': tiny_images.SIZE,
    }
  data = dataclasses.replace(
    config.data,
    cache_dir=str(folder / 'cache'),
    batch_size=8,
    validation_fraction=0.2,
    **of_kind,
  )
  optimizer = dataclasses.replace(
    config.optimizer, warmup_steps=1, learning_rate=3e-3
  )
  changes = {
    'model': _narrow(config.model),
    'data': data,
    'optimizer': optimizer,
    'loop': loop.LoopConfig(num_steps=6, eval_batches=2),
  }
  if isinstance(config, LigoConfig):
    changes |= {
      'learn': dataclasses.replace(config.learn, num_steps=4),
      'small': str(folder / 'small'),
    }
  return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(('before', 'name'), _PAIRS)
def test_a_pair_grows_from_nothing_to_its_report(
  before: str, name: str, tmp_path: pathlib.Path
) -> None:
  tiny.write_text(tmp_path)
  tiny_images.write_folder(tmp_path / 'images', size=tiny_images.SIZE)
  small = configuration.resolve(f'{_FILE}:{before}', PretrainConfig, {})
  pretrain.train(_short(small, tmp_path), workdir=tmp_path / 'small')
  config = configuration.resolve(f'{_FILE}:{name}', LigoConfig, {})
  config.validate()
  train.train(_short(config, tmp_path), workdir=tmp_path / 'large')
  result = json.loads((tmp_path / 'large' / 'result.json').read_text())
  card = result['growth']
  assert card['operator_steps'] == 4
  # Learning is for this.
  assert card['grown_loss'] < card['begun_loss']
  assert (tmp_path / 'large' / 'report.html').is_file()


def test_an_unknown_pair_is_named() -> None:
  with pytest.raises(ValueError, match='bert_small_base, bert_base_large'):
    configuration.resolve(f'{_FILE}:hope', LigoConfig, {})
