"""The packed sequences of a data set: random access, a batch at a time."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from efficient_llm.data import batches, packing, splits, stream, tokenizer
from efficient_llm.data import config as config_lib


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Sequences, numbered through all sources.

  Attributes:
    parts: The text of each source.
    plans: How each is packed.
    pad_id: Fills up what holds no token.
    masker: Hides tokens, for the masked objective.
    masks_stay: Whether a sequence is masked alike every time, or anew for each
      place in the stream.
  """

  parts: tuple[splits.Part, ...]
  plans: tuple[packing.Plan, ...]
  pad_id: int
  masker: batches.Masker | None
  masks_stay: bool

  @property
  def counts(self) -> list[int]:
    """Number of sequences of each source."""
    return [plan.num_sequences for plan in self.plans]

  @property
  def num_tokens(self) -> int:
    """Tokens, padding left out."""
    return sum(plan.num_tokens for plan in self.plans)

  def read(self, rows: Sequence[tuple[int, int]]) -> batches.Batch:
    """Makes a batch.

    Args:
      rows: For each row its place in the stream and its sequence, which is
        `stream.PADDING` for an empty row.

    Returns:
      The batch; see `batches`.
    """
    places, numbers = np.array(rows, np.int64).T
    batch = batches.padding(
      len(rows), self.plans[0].sequence_length, pad_id=self.pad_id
    )
    bounds = itertools.accumulate(self.counts, initial=0)
    for part, plan, (first, end) in zip(
      self.parts, self.plans, itertools.pairwise(bounds), strict=True
    ):
      chosen = np.flatnonzero((numbers >= first) & (numbers < end))
      if len(chosen):
        batches.fill(
          batch,
          chosen,
          plan=plan,
          tokens=part.cache.tokens,
          sequences=numbers[chosen] - first,
        )
    if self.masker is not None:
      keys = numbers if self.masks_stay else places
      # An empty row has nothing to hide, so its key does not matter.
      self.masker(batch, np.where(numbers == stream.PADDING, 0, keys))
    return batch


def pack(
  parts: Sequence[splits.Part],
  *,
  config: config_lib.DataConfig,
  encoder: tokenizer.Tokenizer,
  is_validation: bool,
) -> Sequences:
  """Packs each source on its own.

  Args:
    parts: The text of each source.
    config: The settings.
    encoder: What the text was tokenised with.
    is_validation: Whether masks stay the same in every pass.

  Returns:
    The sequences.

  Raises:
    ValueError: If a source has no text, or all have less than one sequence, or
      the tokenizer does not serve the objective.
  """
  length = config.sequence_length
  num_tokens = sum(int(part.lengths.sum()) for part in parts)
  if num_tokens < length:
    raise ValueError(
      f'the text must fill one sequence of {length} tokens and has only '
      f'{num_tokens}; set data.sequence_length, or data.path to more text.'
    )
  for number, part in enumerate(parts):
    if not len(part.starts):
      raise ValueError(
        f'every source must have text, number {number} of {len(parts)} has '
        'none in this split; leave it out of data.sources.'
      )
  is_masked = config.objective == 'masked'
  return Sequences(
    parts=tuple(parts),
    plans=tuple(
      packing.make_plan(
        part.starts,
        part.lengths,
        sequence_length=length,
        packing=config.packing,
      )
      for part in parts
    ),
    pad_id=encoder.pad_id or 0,
    masker=batches.Masker(encoder, seed=config.seed) if is_masked else None,
    masks_stay=is_validation,
  )
