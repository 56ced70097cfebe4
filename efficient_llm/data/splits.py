"""Parts a corpus into text to train on and text to validate on."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from efficient_llm.data import token_cache

Split = Literal['train', 'validation']

# Below this a held-out share would be too large, too small or missing.
_FEWEST_DOCUMENTS_HELD_OUT = 3


@dataclasses.dataclass(frozen=True)
class Part:
  """Some documents of a cache, or a stretch of each.

  Attributes:
    cache: Where the tokens are.
    starts: First token of each stretch.
    lengths: Number of tokens of each stretch.
    num_bytes: UTF-8 bytes of each stretch; for a tail, in proportion.
    files: For each stretch the number of its file.
    cuts_tails: Whether the split was made within documents.
  """

  cache: token_cache.TokenCache
  starts: np.ndarray
  lengths: np.ndarray
  num_bytes: np.ndarray
  files: np.ndarray
  cuts_tails: bool = False

  def select(self, chosen: np.ndarray) -> 'Part':
    """Keeps the stretches for which `chosen` is true."""
    return dataclasses.replace(
      self,
      starts=self.starts[chosen],
      lengths=self.lengths[chosen],
      num_bytes=self.num_bytes[chosen],
      files=self.files[chosen],
    )


def everything(cache: token_cache.TokenCache) -> Part:
  """All documents of a cache."""
  return Part(cache, cache.starts, cache.lengths, cache.num_bytes, cache.files)


def without(
  cache: token_cache.TokenCache, other: token_cache.TokenCache
) -> Part:
  """All documents of a cache whose text is not also in another one."""
  is_shared = np.isin(cache.content_hashes, other.content_hashes)
  return everything(cache).select(~is_shared)


def divide(
  caches: Sequence[token_cache.TokenCache], *, split: Split, fraction: float
) -> list[Part]:
  """Takes one split of each source.

  A document is held out if the hash of its text says so: equal texts always go
  together, and more text never moves a document. Where this holds out fewer
  than three documents of a source, the tail of each of its documents is held
  out instead, and equal texts in the other sources are left out of both splits.

  Args:
    caches: The sources.
    split: Which split.
    fraction: Share of the documents, or of each, that is held out.

  Returns:
    For each source, its part.

  Raises:
    ValueError: If validation is asked for and nothing is held out.
  """
  if fraction == 0:
    if split == 'validation':
      raise ValueError(
        'validation_fraction=0 holds out no text to validate on; '
        'set data.validation_fraction or data.validation_path.'
      )
    return [everything(cache) for cache in caches]
  held_out = [
    chosen_by_hash(cache.content_hashes, fraction) for cache in caches
  ]
  cut = [
    is_held_out.sum() < _FEWEST_DOCUMENTS_HELD_OUT or is_held_out.all()
    for is_held_out in held_out
  ]
  cut_hashes = [
    cache.content_hashes
    for cache, is_cut in zip(caches, cut, strict=True)
    if is_cut
  ]
  parts = []
  for cache, is_held_out, is_cut in zip(caches, held_out, cut, strict=True):
    if is_cut:
      parts.append(_tails_or_heads(cache, split=split, fraction=fraction))
      continue
    chosen = is_held_out if split == 'validation' else ~is_held_out
    if cut_hashes:
      chosen &= ~np.isin(cache.content_hashes, np.concatenate(cut_hashes))
    parts.append(everything(cache).select(chosen))
  return parts


def chosen_by_hash(content_hashes: np.ndarray, fraction: float) -> np.ndarray:
  """Which examples are for validation, by hashes of what they hold."""
  return content_hashes < np.uint64(fraction * (1 << 63)) * np.uint64(2)


def share_of_island(
  parts: Sequence[Part],
  weights: Sequence[float],
  *,
  island: tuple[int, int],
  sharding: Literal['files', 'sources'],
) -> tuple[list[Part], list[float]]:
  """Gives an island text of its own: every so many-th file or source.

  Args:
    parts: The text of each source.
    weights: The weight of each source.
    island: Index of the island and number of islands.
    sharding: What is dealt to the islands in turn.

  Returns:
    The sources of which the island has text, and their weights.

  Raises:
    ValueError: If there is no text for it.
  """
  index, count = island
  if sharding == 'sources':
    mine, my_weights = list(parts[index::count]), list(weights[index::count])
  else:
    chosen = [part.select(part.files % count == index) for part in parts]
    mine = [part for part in chosen if len(part.starts)]
    my_weights = [
      weight
      for weight, part in zip(weights, chosen, strict=True)
      if len(part.starts)
    ]
  if not mine:
    raise ValueError(
      f'island {index} of {count} must have text of its own, and there are too '
      f"few {sharding}; set data.island_sharding='rows'."
    )
  return mine, my_weights


def _tails_or_heads(
  cache: token_cache.TokenCache, *, split: Split, fraction: float
) -> Part:
  tails = np.floor(cache.lengths * fraction).astype(np.int64)
  heads = cache.lengths - tails
  is_validation = split == 'validation'
  lengths = tails if is_validation else heads
  share = lengths / np.maximum(cache.lengths, 1)
  part = Part(
    cache=cache,
    starts=cache.starts + heads if is_validation else cache.starts,
    lengths=lengths,
    num_bytes=np.rint(cache.num_bytes * share).astype(np.int64),
    files=cache.files,
    cuts_tails=True,
  )
  return part.select(lengths > 0)
