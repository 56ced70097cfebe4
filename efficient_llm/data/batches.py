"""Fills batches from a packing plan, all rows at once, and masks tokens.

A batch is a dict of arrays [B, T]: int32 'tokens', 'targets', 'segment_ids' (1
and up for each packed document, 0 for padding) and 'positions' (from 0 in each
segment), and float32 'loss_weights' (0 where the target does not count).
"""

import numpy as np

from efficient_llm.data import packing, tokenizer

Batch = dict[str, np.ndarray]

MASKED_FRACTION = 0.15
_SHOWN_AS_MASK = 0.8
_SHOWN_AS_RANDOM = 0.1


def padding(num_rows: int, sequence_length: int, *, pad_id: int) -> Batch:
  """Returns a batch of rows that hold nothing and weigh nothing."""
  shape = (num_rows, sequence_length)
  return {
    'tokens': np.full(shape, pad_id, np.int32),
    'targets': np.full(shape, pad_id, np.int32),
    'segment_ids': np.zeros(shape, np.int32),
    'positions': np.zeros(shape, np.int32),
    'loss_weights': np.zeros(shape, np.float32),
  }


def fill(
  batch: Batch,
  rows: np.ndarray,
  *,
  plan: packing.Plan,
  tokens: np.ndarray,
  sequences: np.ndarray,
) -> None:
  """Writes sequences into rows of a batch, as next-token prediction.

  The target is the next token of the same document, also where a piece was cut
  from it; the last token of a document has none and weighs nothing.

  Args:
    batch: Written to.
    rows: Row for each sequence.
    plan: Where the sequences' pieces lie.
    tokens: The token array the plan speaks of.
    sequences: Numbers of the sequences.
  """
  pieces, counts = plan.pieces_of(sequences)
  lengths = plan.lengths[pieces]
  ends = np.cumsum(lengths)
  within = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
  source = np.repeat(plan.starts[pieces], lengths) + within

  # A row's pieces follow one another from column 0.
  piece_ends = np.cumsum(counts)
  tokens_before_row = (ends - lengths)[piece_ends - counts]
  shift = rows * plan.sequence_length - tokens_before_row
  place = np.arange(lengths.sum()) + np.repeat(
    np.repeat(shift, counts), lengths
  )
  segments = packing.ranges(np.ones_like(counts), counts)

  is_last = np.zeros(len(source), bool)
  is_last[ends[~plan.continues[pieces]] - 1] = True
  batch['tokens'].reshape(-1)[place] = tokens[source]
  batch['targets'].reshape(-1)[place] = tokens[source + ~is_last]
  batch['segment_ids'].reshape(-1)[place] = np.repeat(segments, lengths)
  batch['positions'].reshape(-1)[place] = within
  batch['loss_weights'].reshape(-1)[place] = ~is_last


class Masker:
  """Hides tokens for masked-language-model training.

  Of the ordinary tokens 15 % are to be predicted: 80 % of these are shown as
  the mask token, 10 % as a random ordinary token, 10 % as they are. Which, is a
  function of the seed and the row's key alone.

  Source: Devlin et al. 2018, section 3.1, arXiv:1810.04805. Differs: each token
  is chosen independently, where BERT takes exactly 15 % of a sequence.
  """

  def __init__(self, encoder: tokenizer.Tokenizer, *, seed: int):
    if encoder.mask_id is None:
      raise ValueError(
        "objective='masked' needs a tokenizer with a mask token, this one has "
        "none; set data.objective='causal' or another data.tokenizer."
      )
    self._mask_id = encoder.mask_id
    self._seed = seed
    is_ordinary = np.ones(encoder.vocab_size, bool)
    is_ordinary[list(encoder.special_ids)] = False
    self._is_ordinary = is_ordinary
    self._ordinary_ids = np.flatnonzero(is_ordinary).astype(np.int32)

  def __call__(self, batch: Batch, keys: np.ndarray) -> None:
    """Masks a batch in place.

    Args:
      batch: As `fill` leaves it.
      keys: A number for each row; the same number gives the same masks.
    """
    tokens_BT = batch['tokens']
    draws_B2T = np.stack([self._draw(key, tokens_BT.shape[1]) for key in keys])
    choice_BT, token_BT = draws_B2T[:, 0] / MASKED_FRACTION, draws_B2T[:, 1]
    is_chosen_BT = (choice_BT < 1) & self._is_ordinary[tokens_BT]
    is_chosen_BT &= batch['segment_ids'] > 0
    random_BT = self._ordinary_ids[
      (token_BT * len(self._ordinary_ids)).astype(np.int64)
    ]
    is_masked_BT = choice_BT < _SHOWN_AS_MASK
    is_random_BT = choice_BT < _SHOWN_AS_MASK + _SHOWN_AS_RANDOM
    shown_BT = np.where(is_random_BT, random_BT, tokens_BT)
    shown_BT = np.where(is_masked_BT, self._mask_id, shown_BT)
    batch['targets'] = tokens_BT
    batch['tokens'] = np.where(is_chosen_BT, shown_BT, tokens_BT).astype(
      np.int32
    )
    batch['loss_weights'] = is_chosen_BT.astype(np.float32)

  def _draw(self, key: int, sequence_length: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=[self._seed, key]))
    return generator.random((2, sequence_length))
