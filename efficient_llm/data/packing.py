"""Decides which pieces of which documents make each training sequence.

The plan is made once, before training, over spans of one long array of tokens.
Everything after it is random access: sequence i is `piece_offsets[i]` to
`piece_offsets[i + 1]`.
"""

import dataclasses
from typing import Literal

import numpy as np

Packing = Literal['best_fit', 'split']


@dataclasses.dataclass(frozen=True)
class Plan:
  """Pieces of the token array, in the order in which sequences hold them.

  Attributes:
    sequence_length: Tokens in a sequence, padding included.
    piece_offsets: For each sequence its first piece, and the end: int64.
    starts: For each piece its first token in the token array, int64.
    lengths: For each piece its number of tokens, int64.
    continues: For each piece whether its document goes on behind it, so that
      its last token has a next one to predict.
  """

  sequence_length: int
  piece_offsets: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray
  continues: np.ndarray

  @property
  def num_sequences(self) -> int:
    return len(self.piece_offsets) - 1

  @property
  def num_tokens(self) -> int:
    return int(self.lengths.sum())

  def pieces_of(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists the pieces of some sequences and how many each has."""
    firsts = self.piece_offsets[sequences]
    counts = self.piece_offsets[sequences + 1] - firsts
    return ranges(firsts, counts), counts


def make_plan(
  starts: np.ndarray,
  lengths: np.ndarray,
  *,
  sequence_length: int,
  packing: Packing,
) -> Plan:
  """Packs documents into sequences so that each token is in exactly one.

  A document longer than a sequence is always cut. 'split' sets all documents
  end to end and cuts every `sequence_length` tokens: no padding but the last,
  many documents cut. 'best_fit' cuts only what is too long and puts each piece,
  longest first, where it leaves the least room: few cuts, a little padding.

  Args:
    starts: First token of each document in the token array.
    lengths: Number of tokens of each document; documents do not overlap.
    sequence_length: Tokens in a sequence.
    packing: The rule.

  Returns:
    The plan, its sequences ordered by the first document they hold.

  Source: Ding et al. 2024, Best-fit Packing, section 3, arXiv:2404.10830.
    Differs: pieces of one length are placed together, without a segment tree.
  """
  starts, lengths = starts[lengths > 0], lengths[lengths > 0]
  if packing == 'split':
    document, begin, size = _cut_the_whole(lengths, sequence_length)
    sequence = (np.cumsum(size) - size) // sequence_length
  else:
    document, begin, size = _cut_each(lengths, sequence_length)
    bins = _best_fit(size, sequence_length)
    # Pieces are numbered as in the text; number the sequences so too.
    _, first_pieces = np.unique(bins, return_index=True)
    sequence = np.argsort(np.argsort(first_pieces))[bins]
    order = np.argsort(sequence, kind='stable')
    document, begin, size = document[order], begin[order], size[order]
    sequence = sequence[order]
  num_sequences = int(sequence[-1]) + 1 if len(sequence) else 0
  return Plan(
    sequence_length=sequence_length,
    piece_offsets=np.searchsorted(sequence, np.arange(num_sequences + 1)),
    starts=starts[document] + begin,
    lengths=size,
    continues=begin + size < lengths[document],
  )


def ranges(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Joins the ranges [first, first + count) into one array."""
  shifts = firsts - (np.cumsum(counts) - counts)
  return np.repeat(shifts, counts) + np.arange(counts.sum())


def _cut_the_whole(
  lengths: np.ndarray, sequence_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Cuts the joined documents at every sequence's and document's end."""
  ends = np.cumsum(lengths)
  num_tokens = int(ends[-1]) if len(ends) else 0
  cuts = np.union1d(
    ends, np.arange(sequence_length, num_tokens, sequence_length)
  )
  begins = np.concatenate([[0], cuts[:-1]]).astype(np.int64)[: len(cuts)]
  document = np.searchsorted(ends, begins, side='right')
  return document, begins - (ends - lengths)[document], cuts - begins


def _cut_each(
  lengths: np.ndarray, sequence_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Cuts each document from its start into pieces of at most a sequence."""
  num_pieces = -(-lengths // sequence_length)
  document = np.repeat(np.arange(len(lengths)), num_pieces)
  begin = ranges(np.zeros_like(num_pieces), num_pieces) * sequence_length
  size = np.minimum(lengths[document] - begin, sequence_length)
  return document, begin, size


def _best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
  """Assigns pieces to bins, longest first, each where least room is left."""
  order = np.argsort(-sizes, kind='stable')
  _, firsts = np.unique(-sizes[order], return_index=True)
  bins = np.empty(len(sizes), np.int64)
  shelves = _Shelves(capacity)
  ends = np.append(firsts, len(sizes))[1:]
  for first, end in zip(firsts, ends, strict=True):
    pieces = order[first:end]
    size = int(sizes[pieces[0]])
    while len(pieces):
      room = shelves.least_room(size)
      # A bin just filled is the tightest fit again, until it is full.
      fitting = room // size
      chosen = shelves.take(room, -(-len(pieces) // fitting))
      num_placed = min(len(pieces), len(chosen) * fitting)
      bins[pieces[:num_placed]] = np.repeat(chosen, fitting)[:num_placed]
      num_full, rest = divmod(num_placed, fitting)
      shelves.put(room - fitting * size, chosen[:num_full])
      shelves.put(room - rest * size, chosen[num_full:])
      pieces = pieces[num_placed:]
  return bins


class _Shelves:
  """Bins in use, by the room left in them."""

  def __init__(self, capacity: int):
    self._capacity = capacity
    self._num_bins = 0
    self._counts = np.zeros(capacity + 1, np.int64)
    self._chunks: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]

  def least_room(self, size: int) -> int:
    """Finds the least room of at least `size`; new bins offer all of it."""
    enough = self._counts[size:] > 0
    offset = int(enough.argmax())
    return size + offset if enough[offset] else self._capacity

  def take(self, room: int, count: int) -> np.ndarray:
    """Takes up to `count` bins with that room, new ones if there is none."""
    if not self._chunks[room]:
      self._num_bins += count
      return np.arange(self._num_bins - count, self._num_bins)
    chunk = self._chunks[room].pop()
    if len(chunk) > count:
      self._chunks[room].append(chunk[count:])
    self._counts[room] -= min(count, len(chunk))
    return chunk[:count]

  def put(self, room: int, bins: np.ndarray) -> None:
    if room and len(bins):
      self._chunks[room].append(bins)
      self._counts[room] += len(bins)
