"""A few images in folders of their class, and a run that tells them apart."""

import dataclasses
import io
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from efficient_llm.data import pipeline
from efficient_llm.models import transformer
from efficient_llm.training import pretrain
from tests import tiny

SIZE = 6
MODEL = transformer.TransformerConfig(
  vocab_size=3,
  num_layers=2,
  embed_dim=16,
  num_heads=2,
  causal=False,
  norm='layer',
  positions='learned',
  activation='gelu',
  gated=False,
  bias=True,
  qkv_bias=True,
  tie_embeddings=False,
  head_bias=True,
  patch_size=3,
  image_size=SIZE,
  class_layers=1,
  layer_scale=0.1,
  talking_heads=True,
)
CLASSES = ('ant', 'bee', 'cat')
_IMAGES_OF_A_CLASS = 30
NUM_IMAGES = _IMAGES_OF_A_CLASS * len(CLASSES)


def encode(*, size: int, seed: int, brightest: int | None = None) -> bytes:
  """A PNG of noise.

  Args:
    size: Pixels along the side.
    seed: Of the noise.
    brightest: The colour that is brighter than the others.
  """
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 128, (size, size, 3), np.uint8)
  if brightest is not None:
    pixels[..., brightest] += 100
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'PNG')
  return buffer.getvalue()


def write_image(
  path: pathlib.Path, *, size: int, seed: int = 0, brightest: int | None = None
) -> None:
  """Writes a PNG and the folder it is in."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(encode(size=size, seed=seed, brightest=brightest))


def write_folder(
  folder: pathlib.Path, *, size: int, seed: int = 0
) -> pathlib.Path:
  """Writes images of every class, whose colour tells the class."""
  for number, name in enumerate(CLASSES):
    for index in range(_IMAGES_OF_A_CLASS):
      write_image(
        folder / name / f'{seed}-{index}.png',
        size=size,
        seed=(seed * len(CLASSES) + number) * 1000 + index,
        brightest=number,
      )
  return folder


def config(
  folder: pathlib.Path, *, cache_dir: pathlib.Path, **changes: Any
) -> pretrain.PretrainConfig:
  """A run of a CaiT on these images.

  Args:
    folder: From `write_folder`, of images of `SIZE` pixels.
    cache_dir: Where their pixels are kept.
    **changes: Fields of `loop.LoopConfig`.
  """
  data = pipeline.DataConfig(
    path=str(folder),
    objective='classes',
    image_size=SIZE,
    image_shift=1,
    batch_size=8,
    validation_fraction=0.25,
    cache_dir=str(cache_dir),
  )
  run = tiny.config(folder, **{'eval_batches': None, **changes})
  return dataclasses.replace(run, model=MODEL, data=data)
