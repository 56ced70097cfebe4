"""The text of a run: both splits, opened once for all processes."""

import functools
import pathlib
from collections.abc import Callable

import jax
from absl import logging

from efficient_llm.data import pipeline
from efficient_llm.data import tokenizer as tokenizer_lib
from efficient_llm.models import transformer
from efficient_llm.training import processes


def open_both(
  config: pipeline.DataConfig, *, cache_dir: pathlib.Path
) -> tuple[pipeline.Dataset, pipeline.Dataset | None]:
  """Opens the training and the validation split, if there is one.

  The first process tokenises for all, so that they do not write one cache at
  once.

  Args:
    config: The data set.
    cache_dir: Where its tokens are kept, unless the configuration says.

  Raises:
    ValueError: If the configuration or the text will not do.
  """
  has_validation = config.validation_fraction or config.validation_path

  def open_splits(
    log: Callable[..., None],
  ) -> tuple[pipeline.Dataset, pipeline.Dataset | None]:
    open_split = functools.partial(
      pipeline.open_dataset, config, cache_dir=cache_dir, log=log
    )
    train = open_split(split='train')
    return train, open_split(split='validation') if has_validation else None

  if jax.process_count() == 1:
    return open_splits(logging.info)
  processes.on_first(lambda: len(open_splits(logging.info)))
  return open_splits(logging.debug)


def check_vocabulary(
  model: transformer.TransformerConfig, tokenizer: tokenizer_lib.Tokenizer
) -> None:
  """Refuses a tokenizer whose numbers the model has no rows for.

  Raises:
    ValueError: With a size that serves.
  """
  if tokenizer.vocab_size > model.vocab_size:
    raise ValueError(
      f'model.vocab_size={model.vocab_size} must be at least the '
      f"tokenizer's {tokenizer.vocab_size}; set "
      f'--config.model.vocab_size={-(-tokenizer.vocab_size // 64) * 64}.'
    )
