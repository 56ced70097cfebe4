"""Text in any form -> batches for training. READ FIRST of this package.

  config = pipeline.DataConfig(path='my_texts/', batch_size=64)
  dataset = pipeline.open_dataset(config, split='train')
  for batch in dataset.iterate(process=(0, 1)):
    ...

Documents are tokenised once into a cache, and a plan packs them into sequences,
so that everything after it is random access; see `dataset`.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

from absl import logging

from efficient_llm.data import (
  bpe,
  corpus,
  dataset,
  sequences,
  splits,
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
  if config.objective == 'classes':
    raise ValueError(
      "data.objective='classes' is of images and this needs text; set "
      'data.objective.'
    )
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
  opened = Dataset(config, split=split, encoder=encoder, parts=parts)
  log(f'data: {split}: {opened.describe()}')
  return opened


class Dataset(dataset.Dataset):
  """One split of a text, packed into sequences.

  Attributes:
    tokenizer: Turns its tokens into text.
  """

  def __init__(
    self,
    config: DataConfig,
    *,
    split: splits.Split,
    encoder: tokenizer.Tokenizer,
    parts: Sequence[splits.Part],
  ):
    fingerprint = _fingerprint(config, split, encoder, parts)
    super().__init__(config, split=split, fingerprint=fingerprint)
    self.tokenizer = encoder
    self._sequences = self._pack(parts)
    if not self._is_validation and self.num_sequences < config.batch_size:
      raise ValueError(
        f'the text must fill one batch of batch_size={config.batch_size} and '
        f'makes only {self.num_sequences} sequences; set data.batch_size or '
        'data.sequence_length, or data.path to more text.'
      )

  @property
  def vocabulary(self) -> tokenizer.Tokenizer:
    """Targets are tokens."""
    return self.tokenizer

  @property
  def num_tokens(self) -> int:
    """Tokens in one pass, padding left out."""
    return self._sequences.num_tokens

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

  def _examples(self) -> dataset.Examples:
    weights = self.config.weights or (1.0,) * len(self.config.paths)
    return _as_examples(self._sequences, weights)

  def _examples_of_island(
    self, island: tuple[int, int]
  ) -> tuple[dataset.Examples, tuple[int, int]]:
    examples = self._examples()
    sharding = self.config.island_sharding
    if sharding == 'rows' or island[1] == 1 or self._is_validation:
      return examples, island
    parts, weights = splits.share_of_island(
      self._sequences.parts, examples.weights, island=island, sharding=sharding
    )
    return _as_examples(self._pack(parts), weights), (0, 1)

  def _pack(self, parts: Sequence[splits.Part]) -> sequences.Sequences:
    return sequences.pack(
      parts,
      config=self.config,
      encoder=self.tokenizer,
      is_validation=self._is_validation,
    )


def _as_examples(
  packed: sequences.Sequences, weights: Sequence[float]
) -> dataset.Examples:
  return dataset.Examples(packed.counts, weights, packed.read)


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
