"""A few images in folders of their class, which a small model tells apart."""

import io
import pathlib

import numpy as np
from PIL import Image

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
