"""Text in any form -> batches for training. READ FIRST of this package.

  config = pipeline.DataConfig(path='my_texts/', batch_size=64)
  dataset = pipeline.open_dataset(config, split='train')
  for batch in dataset.iterate(process=(0, 1)):
    ...

Documents are tokenised once into a cache, and a plan packs them into sequences,
so that everything after it is random access: the batch of a step follows from
the configuration and the step alone, whatever the number of processes, and the
state of an iterator is a number.
"""

import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Sequence
from typing import cast

import grain
from absl import logging

from efficient_llm.data import (
  batches,
  bpe,
  corpus,
  iterator,
  sequences,
  splits,
  stream,
  token_cache,
  tokenizer,
)
from efficient_llm.data.config import DataConfig

__all__ = ['DataConfig', 'Dataset', 'open_dataset']


def open_dataset(
  config: DataConfig,
  *,
  split: splits.Split = 'train',
  cache_dir: str | pathlib.Path | None = None,
  log: token_cache.Log = logging.info,
) -> 'Dataset':
  """Opens one split of a data set, tokenising the text where that is not done.

  Args:
    config: The data set.
    split: Which part of it.
    cache_dir: Folder of the token cache where `config.cache_dir` is None; by
      default a folder in the user's home.
    log: Takes lines about progress and about what was found.

  Returns:
    The data set.

  Raises:
    ValueError: If the configuration or the text will not do, in one line.
  """
  config.validate()
  home = pathlib.Path.home() / '.cache' / 'efficient_llm'
  folder = pathlib.Path(config.cache_dir or cache_dir or home)
  files = [corpus.find_files(path) for path in config.paths]
  if config.bpe_vocab_size is None:
    encoder = tokenizer.load(config.tokenizer)
  else:
    encoder = bpe.open_or_train(
      [file for listed in files for file in listed],
      vocab_size=config.bpe_vocab_size,
      options=config.read_options,
      cache_dir=folder,
      log=log,
    )
  open_cache = functools.partial(
    token_cache.open_or_build,
    options=config.read_options,
    encoder=encoder,
    cache_dir=folder,
    log=log,
  )
  if config.validation_path is None:
    caches = [open_cache(listed) for listed in files]
    fraction = config.validation_fraction
    parts = splits.divide(caches, split=split, fraction=fraction)
  else:
    held_out = open_cache(corpus.find_files(config.validation_path))
    parts = (
      [splits.everything(held_out)]
      if split == 'validation'
      else [splits.without(open_cache(listed), held_out) for listed in files]
    )
  dataset = Dataset(config, split=split, encoder=encoder, parts=parts)
  log(f'data: {split}: {dataset.describe()}')
  return dataset


class Dataset:
  """One split of a data set, packed into sequences.

  Attributes:
    config: The settings it was opened with.
    tokenizer: Turns its tokens into text.
    fingerprint: Hash of the text, its tokens and all settings that decide what
      the sequences are and in which order they come.
  """

  def __init__(
    self,
    config: DataConfig,
    *,
    split: splits.Split,
    encoder: tokenizer.Tokenizer,
    parts: Sequence[splits.Part],
  ):
    self.config = config
    self.tokenizer = encoder
    self.fingerprint = _fingerprint(config, split, encoder, parts)
    self._is_validation = split == 'validation'
    self._sequences = self._pack(parts)
    if not self._is_validation and self.num_sequences < config.batch_size:
      raise ValueError(
        f'the text must fill one batch of batch_size={config.batch_size} and '
        f'makes only {self.num_sequences} sequences; set data.batch_size or '
        'data.sequence_length, or data.path to more text.'
      )

  @property
  def num_tokens(self) -> int:
    """Tokens in one pass, padding left out."""
    return self._sequences.num_tokens

  @property
  def num_sequences(self) -> int:
    """Sequences in one pass."""
    return sum(self._sequences.counts)

  @property
  def steps_per_pass(self) -> int:
    """Batches of a single island that hold as many sequences as a pass."""
    return math.ceil(self.num_sequences / self.config.batch_size)

  def statistics(self) -> dict[str, int | float]:
    """Counts what the split holds and how full its sequences are.

    `invalid_utf8` counts both splits, which are read together.
    """
    num_bytes = sum(int(part.num_bytes.sum()) for part in self._sequences.parts)
    capacity = self.num_sequences * self.config.sequence_length
    return {
      'documents': sum(len(part.starts) for part in self._sequences.parts),
      'bytes': num_bytes,
      'tokens': self.num_tokens,
      'bytes_per_token': num_bytes / self.num_tokens,
      'sequences': self.num_sequences,
      'packing_efficiency': self.num_tokens / capacity,
      'invalid_utf8': sum(
        part.cache.num_invalid_utf8 for part in self._sequences.parts
      ),
    }

  def describe(self) -> str:
    """Says the statistics in a line."""
    found = self.statistics()
    line = (
      f'{found["documents"]:,} documents, {found["bytes"] / 1e6:,.2f} MB, '
      f'{found["tokens"]:,} tokens in {found["sequences"]:,} sequences, '
      f'{found["packing_efficiency"]:.1%} full'
    )
    if found['invalid_utf8']:
      line += f'; replaced {found["invalid_utf8"]:,} invalid UTF-8 sequences'
    if any(part.cuts_tails for part in self._sequences.parts):
      line += '; a source has few documents, so the tail of each is held out'
    return line

  def iterate(
    self,
    *,
    process: tuple[int, int] = (0, 1),
    island: tuple[int, int] = (0, 1),
    repeat: bool = True,
    start: int = 0,
  ) -> iterator.BatchIterator:
    """Iterates over this process's rows of every batch.

    Training shuffles afresh each epoch. Validation takes all sequences in
    order, pass after pass. The last batch of a validation pass, and of a
    training pass without `repeat`, is filled up with rows of zero weight.

    Args:
      process: Index of this process and number of processes, in its island. It
        gets a stretch of the rows of each batch, in the order of processes.
      island: Index of this island and number of islands. They see disjoint
        sequences in an epoch; `config.island_sharding` says how.
      repeat: Whether to go on for ever or stop after a pass.
      start: The first step.

    Returns:
      The iterator.

    Raises:
      ValueError: If the batch does not part evenly among the processes, or the
        text not among the islands.
    """
    steps = self._steps(process=process, island=island, repeat=repeat)
    batch_iterator = iterator.BatchIterator(
      steps,
      fingerprint=self.fingerprint,
      examples_per_step=self.config.batch_size * island[1],
      prefetch_batches=self.config.prefetch_batches,
    )
    batch_iterator.seek(start)
    return batch_iterator

  def batch_at(self, step: int) -> batches.Batch:
    """Makes the whole batch of a step, for one process and one island."""
    steps = self._steps(process=(0, 1), island=(0, 1), repeat=True)
    return cast(batches.Batch, steps[step])

  def _steps(
    self, *, process: tuple[int, int], island: tuple[int, int], repeat: bool
  ) -> grain.MapDataset:
    _check_share('process', process)
    _check_share('island', island)
    batch_size = self.config.batch_size
    if batch_size % process[1]:
      raise ValueError(
        f'{batch_size=} must be divisible by the {process[1]} processes of an '
        'island; set data.batch_size.'
      )
    chosen = self._sequences
    weights = self.config.weights or (1.0,) * len(self.config.paths)
    sharding = self.config.island_sharding
    if sharding != 'rows' and island[1] > 1 and not self._is_validation:
      parts, weights = splits.share_of_island(
        chosen.parts, weights, island=island, sharding=sharding
      )
      chosen = self._pack(parts)
      island = (0, 1)
    if self._is_validation:
      order = stream.in_order(chosen.counts)
    else:
      seed = self.config.seed if self.config.shuffle else None
      order = stream.mixed(
        chosen.counts, weights=weights, seed=seed, repeat=repeat
      )
    if self._is_validation or not repeat:
      order = stream.padded(order, multiple=batch_size * island[1])
    if self._is_validation and repeat:
      order = order.repeat()
    rows = stream.Rows(order, batch_size, process=process, island=island)
    return grain.MapDataset.source(rows).batch(
      rows.rows_per_step, batch_fn=chosen.read
    )

  def _pack(self, parts: Sequence[splits.Part]) -> sequences.Sequences:
    return sequences.pack(
      parts,
      config=self.config,
      encoder=self.tokenizer,
      is_validation=self._is_validation,
    )


def _check_share(name: str, share: tuple[int, int]) -> None:
  index, count = share
  if not 0 <= index < count:
    raise ValueError(
      f'{name}={share} must be an index below the count; count from 0.'
    )


def _fingerprint(
  config: DataConfig,
  split: splits.Split,
  encoder: tokenizer.Tokenizer,
  parts: Sequence[splits.Part],
) -> str:
  settings = {
    'split': split,
    'tokenizer': encoder.fingerprint,
    'caches': [part.cache.fingerprint for part in parts],
    'weights': config.weights,
    'sequence_length': config.sequence_length,
    'packing': config.packing,
    'objective': config.objective,
    'shuffle': config.shuffle,
    'seed': config.seed,
    'island_sharding': config.island_sharding,
  }
  digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
  for part in parts:
    digest.update(part.starts.tobytes())
    digest.update(part.lengths.tobytes())
  return digest.hexdigest()
