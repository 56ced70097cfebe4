"""Images with classes -> batches for training.

  config = pipeline.DataConfig(path='digits', objective='classes', image_size=8)
  dataset = images.open_dataset(config, split='train')
  for batch in dataset.iterate(process=(0, 1)):
    ...

A batch is a dict of 'images' [B, size, size, channels] as bytes, and of
'targets' and 'loss_weights' [B, 1]: an image has one target, its class. All
else is as with text: order, shares of processes and islands, and resuming
follow from the step alone; what is drawn for an image follows from the seed and
its place in the stream, so that every epoch draws anew.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import logging

from efficient_llm.data import (
  batches,
  dataset,
  image_cache,
  image_files,
  splits,
  stream,
)
from efficient_llm.data.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Classes:
  """Names of classes, whose numbers are the targets."""

  names: tuple[str, ...]

  @property
  def vocab_size(self) -> int:
    """How many there are."""
    return len(self.names)

  @property
  def fingerprint(self) -> str:
    """Hash of all names."""
    text = json.dumps(self.names).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


class Dataset(dataset.Dataset):
  """One split of a set of images.

  Attributes:
    classes: Names of the classes.
  """

  def __init__(
    self,
    config: DataConfig,
    *,
    split: splits.Split,
    cache: image_cache.ImageCache,
    numbers: np.ndarray,
    labels: np.ndarray,
    classes: Classes,
  ):
    """Takes some images of a cache.

    Args:
      config: The settings.
      split: Which split it is.
      cache: Where the pixels are.
      numbers: Of the images in it.
      labels: For each of them the number of its class.
      classes: Names of the classes.

    Raises:
      ValueError: If they do not fill a batch.
    """
    fingerprint = _fingerprint(config, split, cache, numbers, classes)
    super().__init__(config, split=split, fingerprint=fingerprint)
    self.classes = classes
    self._pixels = cache.pixels
    self._numbers, self._labels = numbers, labels
    num_wanted = 1 if split == 'validation' else config.batch_size
    if len(numbers) < num_wanted:
      raise ValueError(
        f'{config.path!r} must have {num_wanted} images for {split} and has '
        f'{len(numbers)}; set data.batch_size or data.validation_fraction, or '
        'data.path to more images.'
      )

  @property
  def vocabulary(self) -> Classes:
    """Targets are classes."""
    return self.classes

  def statistics(self) -> dict[str, int | float]:
    """Counts images and classes."""
    return {'images': len(self._numbers), 'classes': self.classes.vocab_size}

  def _examples(self) -> dataset.Examples:
    return dataset.Examples([len(self._numbers)], (1.0,), self._read)

  def _read(self, rows: Sequence[tuple[int, int]]) -> batches.Batch:
    places, numbers = np.array(rows, np.int64).T
    is_there = numbers != stream.PADDING
    chosen = np.where(is_there, numbers, 0)
    pixels = self._pixels[self._numbers[chosen]]
    if not self._is_validation:
      pixels = augment(pixels, places, self.config)
    return {
      'images': np.where(is_there[:, None, None, None], pixels, np.uint8(0)),
      'targets': np.where(is_there, self._labels[chosen], 0)[:, None],
      'loss_weights': is_there.astype(np.float32)[:, None],
    }


def open_dataset(
  config: DataConfig,
  *,
  split: splits.Split = 'train',
  cache_dir: str | pathlib.Path | None = None,
  log: image_cache.Log = logging.info,
) -> Dataset:
  """Opens one split of a set of images, decoding them where that is not done.

  Equal images are all in one split, and more images never move another.

  Args:
    config: The data set.
    split: Which part of it.
    cache_dir: Folder of the decoded images where `config.cache_dir` is None; by
      default a folder in the user's home.
    log: Takes lines about progress and about what was found.

  Raises:
    ValueError: If the configuration or the images will not do, in one line.
  """
  config.validate()
  home = pathlib.Path.home() / '.cache' / 'efficient_llm'
  folder = pathlib.Path(config.cache_dir or cache_dir or home)

  def open_cache(path: str) -> image_cache.ImageCache:
    files = image_files.find(
      path, size=config.image_size or 0, channels=config.image_channels
    )
    return image_cache.open_or_build(files, cache_dir=folder, log=log)

  cache = open_cache(config.path)
  classes = Classes(cache.classes)
  is_validation = split == 'validation'
  if config.validation_path is None:
    held_out = splits.chosen_by_hash(
      cache.content_hashes, config.validation_fraction
    )
    chosen, labels = held_out == is_validation, cache.labels
  else:
    other = open_cache(config.validation_path)
    if is_validation:
      labels = _labels_among(classes, other, config.validation_path)
      chosen, cache = np.ones(len(labels), bool), other
    else:
      labels = cache.labels
      chosen = ~np.isin(cache.content_hashes, other.content_hashes)
  opened = Dataset(
    config,
    split=split,
    cache=cache,
    numbers=np.flatnonzero(chosen),
    labels=labels[chosen],
    classes=classes,
  )
  found = opened.statistics()
  log(
    f'data: {split}: {found["images"]:,} images of {found["classes"]:,} classes'
  )
  return opened


def augment(
  pixels_BYXC: np.ndarray, keys: np.ndarray, config: DataConfig
) -> np.ndarray:
  """Moves and mirrors images at random.

  Args:
    pixels_BYXC: The images.
    keys: A number for each; the same number draws the same.
    config: How far they are moved, whether they are mirrored, and the seed.
  """
  shift, size = config.image_shift, pixels_BYXC.shape[1]
  if not shift and not config.image_flip:
    return pixels_BYXC
  draws_B3 = np.stack(
    [
      np.random.Generator(np.random.Philox(key=[config.seed, key])).random(3)
      for key in keys
    ]
  )
  moves_B2 = (draws_B3[:, :2] * (2 * shift + 1)).astype(np.int64) - shift
  places = np.arange(size)
  rows_BY = np.clip(places + moves_B2[:, :1], 0, size - 1)
  columns_BX = np.clip(places + moves_B2[:, 1:], 0, size - 1)
  if config.image_flip:
    is_flipped = draws_B3[:, 2:] < 0.5
    columns_BX = np.where(is_flipped, columns_BX[:, ::-1], columns_BX)
  images_B = np.arange(len(pixels_BYXC))[:, None, None]
  return pixels_BYXC[images_B, rows_BY[:, :, None], columns_BX[:, None]]


def _labels_among(
  classes: Classes, other: image_cache.ImageCache, path: str
) -> np.ndarray:
  """Labels of other images as numbers of these classes."""
  unknown = sorted(set(other.classes) - set(classes.names))
  if unknown:
    raise ValueError(
      f'validation_path={path!r} must have no class that data.path has not, '
      f'and has {unknown[0]!r}; set data.validation_path.'
    )
  places = np.array([classes.names.index(name) for name in other.classes])
  return places[other.labels].astype(np.int32)


def _fingerprint(
  config: DataConfig,
  split: splits.Split,
  cache: image_cache.ImageCache,
  numbers: np.ndarray,
  classes: Classes,
) -> str:
  settings = {
    'split': split,
    'cache': cache.fingerprint,
    'classes': classes.fingerprint,
    'shift': config.image_shift,
    'flip': config.image_flip,
    'shuffle': config.shuffle,
    'seed': config.seed,
  }
  digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
  digest.update(numbers.tobytes())
  return digest.hexdigest()
