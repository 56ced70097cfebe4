"""The data of a run: both splits, opened once for all processes."""

import functools
import pathlib
from collections.abc import Callable

import jax
from absl import logging

from efficient_llm.data import dataset as dataset_lib
from efficient_llm.data import images, pipeline
from efficient_llm.data import tokenizer as tokenizer_lib
from efficient_llm.models import transformer
from efficient_llm.training import processes


def open_both(
  config: pipeline.DataConfig, *, cache_dir: pathlib.Path
) -> tuple[dataset_lib.Dataset, dataset_lib.Dataset | None]:
  """Opens the training and the validation split, if there is one.

  The first process tokenises, or decodes, for all, so that they do not write
  one cache at once.

  Args:
    config: The data set, of text or of images.
    cache_dir: Where it is kept as numbers, unless the configuration says.

  Raises:
    ValueError: If the configuration or the data will not do.
  """
  is_images = config.objective == 'classes'
  open_dataset = images.open_dataset if is_images else pipeline.open_dataset
  has_validation = config.validation_fraction or config.validation_path

  def open_splits(
    log: Callable[..., None],
  ) -> tuple[dataset_lib.Dataset, dataset_lib.Dataset | None]:
    open_split = functools.partial(
      open_dataset, config, cache_dir=cache_dir, log=log
    )
    train = open_split(split='train')
    return train, open_split(split='validation') if has_validation else None

  if jax.process_count() == 1:
    return open_splits(logging.info)
  processes.on_first(lambda: len(open_splits(logging.info)))
  return open_splits(logging.debug)


def tokenizer_of(
  dataset: dataset_lib.Dataset,
) -> tokenizer_lib.Tokenizer | None:
  """What turns tokens into text; None for images."""
  return dataset.tokenizer if isinstance(dataset, pipeline.Dataset) else None


def check_vocabulary(
  model: transformer.TransformerConfig, dataset: dataset_lib.Dataset
) -> None:
  """Refuses data whose targets the model has no outputs for.

  Raises:
    ValueError: With a size that serves.
  """
  found = dataset.vocabulary.vocab_size
  if model.reads_images and found != model.vocab_size:
    raise ValueError(
      f'model.vocab_size={model.vocab_size} must be the number of classes, '
      f'{found}; set --config.model.vocab_size={found}.'
    )
  if found > model.vocab_size:
    raise ValueError(
      f'model.vocab_size={model.vocab_size} must be at least the '
      f"tokenizer's {found}; set "
      f'--config.model.vocab_size={-(-found // 64) * 64}.'
    )
