r"""Reads images and the names of their classes.

What a path may be:

  digits                      scikit-learn's 1,797 digits of 8 x 8 pixels
  a folder                    CLASS/….png and .jpg, in folders named after the
                              class, at any depth below
  .arrayrecord .array_record  each record the name of the class in UTF-8, a
                              newline, and the bytes of an image file:
                              writer.write(b'cat\n' + path.read_bytes())
"""

import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python import array_record_data_source

from efficient_llm.data import corpus, staging

DIGITS = 'digits'
_RECORDS = ('.arrayrecord', '.array_record')
_EXTENSIONS = ('.png', '.jpg', '.jpeg', '.PNG', '.JPG', '.JPEG', *_RECORDS)
_DIGITS_MAXIMUM = 16
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ImageFiles:
  """Where images are.

  Attributes:
    files: Empty for the digits.
    size: Pixels along the side that images get.
    channels: 3 colours or 1.
  """

  files: tuple[corpus.File, ...]
  size: int
  channels: int

  @property
  def key(self) -> str:
    """Hash of which files are read, and how, without reading them."""
    listing = [
      (os.path.abspath(file.path), file.size_bytes, file.modified_ns)
      for file in self.files
    ]
    settings = [_FORMAT, listing, self.size, self.channels]
    return staging.digest([json.dumps(settings).encode()])

  def read(self) -> Iterator[tuple[str, np.ndarray]]:
    """Reads all images.

    Yields:
      The name of the class, and the pixels [size, size, channels] as bytes.

    Raises:
      ValueError: If an image is not whole; names its file.
    """
    if not self.files:
      yield from self._read_digits()
      return
    for file in self.files:
      with corpus.readable(file.path):
        if file.path.suffix in _RECORDS:
          yield from self._read_records(file.path)
        else:
          name = _class_of(file)
          place = repr(str(file.path))
          yield name, self._decode(file.path.read_bytes(), place)

  def _read_digits(self) -> Iterator[tuple[str, np.ndarray]]:
    images, targets = _load_digits()
    for image, target in zip(images, targets, strict=True):
      pixels = np.rint(image * (255 / _DIGITS_MAXIMUM)).astype(np.uint8)
      yield str(target), self._fit(_pillow().fromarray(pixels))

  def _read_records(
    self, path: pathlib.Path
  ) -> Iterator[tuple[str, np.ndarray]]:
    with array_record_data_source.ArrayRecordDataSource(str(path)) as records:
      for number in range(len(records)):
        place = f'{str(path)!r} record {number}'
        name, newline, encoded = records[number].partition(b'\n')
        if not newline:
          raise ValueError(
            f'{place} must be the name of a class, a newline and an image; '
            'write it anew.'
          )
        yield name.decode(errors='replace'), self._decode(encoded, place)

  def _decode(self, encoded: bytes, place: str) -> np.ndarray:
    pillow = _pillow()
    try:
      with pillow.open(io.BytesIO(encoded)) as image:
        return self._fit(image)
    # Decoders raise errors of many kinds on broken files.
    except Exception as error:
      reason = ' '.join(str(error).split())
      raise ValueError(
        f'{place} must be a whole image: {reason}; mend or leave it out.'
      ) from error

  def _fit(self, image: Any) -> np.ndarray:
    """Scales the shorter side, and cuts the longer one on both ends."""
    pillow = _pillow()
    image = image.convert('L' if self.channels == 1 else 'RGB')
    if image.size != (self.size, self.size):
      scale = self.size / min(image.size)
      width, height = (max(self.size, round(x * scale)) for x in image.size)
      image = image.resize((width, height), pillow.Resampling.BICUBIC)
      left, top = (width - self.size) // 2, (height - self.size) // 2
      image = image.crop((left, top, left + self.size, top + self.size))
    return np.asarray(image, np.uint8).reshape(self.size, self.size, -1)


def find(path: str, *, size: int, channels: int) -> ImageFiles:
  """Lists the images that a path stands for.

  Args:
    path: See above.
    size: Pixels along the side that images get.
    channels: 3 colours or 1.

  Raises:
    ValueError: If nothing is there, or an image is in no folder of a class.
  """
  if path == DIGITS:
    return ImageFiles((), size, channels)
  files = corpus.find_files(path, extensions=_EXTENSIONS)
  for file in files:
    if file.path.suffix not in _RECORDS:
      _class_of(file)
  return ImageFiles(tuple(files), size, channels)


def _class_of(file: corpus.File) -> str:
  name, slash, _ = file.name.partition('/')
  if not slash:
    raise ValueError(
      f'{str(file.path)!r} must lie in a folder that is named after its class; '
      'move it, or set data.path to the folder above.'
    )
  return name


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
  try:
    from sklearn import datasets
  except ImportError as error:
    raise ValueError(
      f"path={DIGITS!r} needs scikit-learn; pip install 'efficient_llm[vision]'"
      ' or set data.path to images.'
    ) from error
  found: Any = datasets.load_digits()
  return found.images, found.target


def _pillow() -> Any:
  try:
    from PIL import Image
  except ImportError as error:
    raise ValueError(
      "Images need pillow; pip install 'efficient_llm[vision]'."
    ) from error
  return Image
