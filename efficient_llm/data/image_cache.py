"""Decodes and scales images once and keeps their pixels, memory-mapped.

So a broken image is found before training, and reading one is a copy. An entry
takes size x size x channels bytes an image: 150 kB at 224 pixels.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable

import numpy as np

from efficient_llm.data import corpus, image_files, staging

Log = Callable[[str], None]

_PIXELS = 'pixels.bin'
_TABLE = 'images.bin'
_CONTENTS = (_PIXELS, _TABLE)
_SECS_BETWEEN_LOGS = 5.0
_IMAGE = np.dtype([('name', np.int64), ('content_hash', np.uint64)])


@dataclasses.dataclass(frozen=True)
class ImageCache:
  """Images, one after another.

  Attributes:
    pixels: [images, size, size, channels], bytes, memory-mapped.
    labels: For each image the number of its class.
    classes: Names of all classes, sorted.
    content_hashes: For each image a hash of its pixels.
    fingerprint: Hash of all of the above.
  """

  pixels: np.ndarray
  labels: np.ndarray
  classes: tuple[str, ...]
  content_hashes: np.ndarray
  fingerprint: str


def open_or_build(
  files: image_files.ImageFiles, *, cache_dir: pathlib.Path, log: Log
) -> ImageCache:
  """Opens the entry for these images, making it first where it is missing.

  Args:
    files: Where the images are.
    cache_dir: Folder of all entries; made where missing.
    log: Takes a line of progress every few seconds.

  Returns:
    The images, checked against the hash made when they were written.

  Raises:
    ValueError: If an image cannot be read or the entry cannot be written.
  """
  return staging.open_or_build(
    cache_dir / f'images-{files.key}',
    open_entry=_open,
    build=lambda folder: _build(folder, files, log),
    log=log,
  )


def _build(
  folder: pathlib.Path, files: image_files.ImageFiles, log: Log
) -> None:
  names: dict[str, int] = {}
  rows: list[tuple[int, int]] = []
  last = time.monotonic()
  with (folder / _PIXELS).open('wb') as output:
    for name, pixels in files.read():
      raw = pixels.tobytes()
      output.write(raw)
      number = names.setdefault(name, len(names))
      rows.append((number, staging.content_hash(raw)))
      if time.monotonic() - last > _SECS_BETWEEN_LOGS:
        last = time.monotonic()
        log(f'data: decoded {len(rows):,} images')
  if not rows:
    raise ValueError('data.path must hold an image, and its files hold none.')
  (folder / _TABLE).write_bytes(np.array(rows, _IMAGE).tobytes())
  summary = {
    'names': list(names),
    'shape': [len(rows), files.size, files.size, files.channels],
  }
  staging.write_summary(folder, _CONTENTS, summary)


def _open(folder: pathlib.Path) -> ImageCache | None:
  """Opens an entry; None where it is missing or not as it was written."""
  with corpus.readable(folder):
    found = staging.read_summary(folder, _CONTENTS)
    if found is None:
      return None
    summary, fingerprint = found
    table = np.fromfile(folder / _TABLE, _IMAGE)
    shape = tuple(summary['shape'])
    pixels = np.memmap(folder / _PIXELS, np.uint8, 'r', shape=shape)
  classes = sorted(summary['names'])
  places = np.array([classes.index(name) for name in summary['names']])
  return ImageCache(
    pixels=pixels,
    labels=places[table['name']].astype(np.int32),
    classes=tuple(classes),
    content_hashes=table['content_hash'],
    fingerprint=fingerprint,
  )
