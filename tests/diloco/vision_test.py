"""Islands train on images as on text."""

import dataclasses
import json
import pathlib

import pytest

from efficient_llm.diloco import train
from efficient_llm.diloco.config import DilocoConfig
from tests import tiny_images


@pytest.mark.slow
def test_islands_learn_classes(tmp_path: pathlib.Path) -> None:
  images = tiny_images.write_folder(tmp_path / 'images', size=tiny_images.SIZE)
  run = tiny_images.config(images, cache_dir=tmp_path / 'cache', num_steps=60)
  fields = {
    field.name: getattr(run, field.name) for field in dataclasses.fields(run)
  }
  config = DilocoConfig(**fields, islands=2, sync_period=5)
  outcome = train.train(config, workdir=tmp_path / 'run')
  # Chance is a third.
  assert outcome.eval_metrics['accuracy'] > 0.8
  result = json.loads((tmp_path / 'run' / 'result.json').read_text())
  # Both islands' rows.
  assert result['num_tokens'] == 60 * 8 * 2
