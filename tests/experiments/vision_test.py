"""Images end to end: exit codes, and configurations that fit together."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from efficient_llm.ligo import pair
from efficient_llm.ligo.config import LigoConfig
from efficient_llm.training import pretrain
from experiments import configuration
from tests import tiny_images

Refusal = Callable[[Callable[[], Any]], str]
_CONFIGS = 'experiments/configs'


def test_a_broken_image_is_bad_input(
  tmp_path: pathlib.Path, refusal: Refusal
) -> None:
  images = tiny_images.write_folder(tmp_path / 'images', size=tiny_images.SIZE)
  (images / 'bee' / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(40))
  config = tiny_images.config(images, cache_dir=tmp_path / 'cache')

  def run() -> int:
    pretrain.train(config, workdir=tmp_path / 'run')
    return 0

  line = refusal(run)
  assert 'bee/broken.png' in line
  assert 'must be a whole image' in line


@pytest.mark.parametrize('name', ['cait', 'deit'])
def test_the_configurations_of_digits_are_valid(name: str) -> None:
  configuration.resolve(
    f'{_CONFIGS}/pretrain_vision_cpu.py:{name}', pretrain.PretrainConfig, {}
  )


def test_the_large_model_of_digits_grows_out_of_the_small_one() -> None:
  small = configuration.resolve(
    f'{_CONFIGS}/pretrain_vision_cpu.py', pretrain.PretrainConfig, {}
  )
  file = f'{_CONFIGS}/ligo_vision_cpu.py'
  large = configuration.resolve(file, LigoConfig, {})
  pair.check(small.model, large.model)
  scratch = configuration.resolve(
    f'{file}:scratch', pretrain.PretrainConfig, {}
  )
  assert scratch.model == large.model
  assert scratch.data == large.data == small.data
  assert scratch.loop == large.loop
