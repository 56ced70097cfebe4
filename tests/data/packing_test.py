"""Packing loses nothing, repeats nothing and keeps documents apart."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm.data import packing

_LENGTHS = st.lists(st.integers(0, 40), max_size=60)
_PACKINGS = st.sampled_from(['best_fit', 'split'])


def _plan(lengths, sequence_length, how):
  lengths = np.array(lengths, np.int64)
  # Documents lie apart, so that a token's number says whose it is.
  starts = np.arange(len(lengths)) * 1000
  return packing.make_plan(
    starts, lengths, sequence_length=sequence_length, packing=how
  )


@hypothesis.given(_LENGTHS, st.integers(2, 16), _PACKINGS)
def test_every_token_is_in_exactly_one_place(lengths, sequence_length, how):
  plan = _plan(lengths, sequence_length, how)
  packed = packing.ranges(plan.starts, plan.lengths)
  wanted = [
    1000 * document + token
    for document, length in enumerate(lengths)
    for token in range(length)
  ]
  assert sorted(packed.tolist()) == wanted


@hypothesis.given(_LENGTHS, st.integers(2, 16), _PACKINGS)
def test_no_sequence_is_empty_or_too_long(lengths, sequence_length, how):
  plan = _plan(lengths, sequence_length, how)
  sequences = np.arange(plan.num_sequences)
  pieces, counts = plan.pieces_of(sequences)
  assert pieces.tolist() == list(range(len(plan.lengths)))
  used = np.bincount(np.repeat(sequences, counts), plan.lengths)
  assert np.all((used > 0) & (used <= sequence_length))


@hypothesis.given(_LENGTHS, st.integers(2, 16), _PACKINGS)
def test_only_the_last_piece_of_a_document_does_not_continue(
  lengths, sequence_length, how
):
  plan = _plan(lengths, sequence_length, how)
  ends = {1000 * d + length for d, length in enumerate(lengths) if length}
  is_last = [int(end) in ends for end in plan.starts + plan.lengths]
  assert is_last == (~plan.continues).tolist()


@hypothesis.given(_LENGTHS, st.integers(2, 16))
def test_splitting_fills_all_sequences_but_the_last(lengths, sequence_length):
  plan = _plan(lengths, sequence_length, 'split')
  assert plan.num_sequences == -(-sum(lengths) // sequence_length)


@hypothesis.given(_LENGTHS, st.integers(2, 16))
def test_best_fit_cuts_only_what_is_longer_than_a_sequence(
  lengths, sequence_length
):
  plan = _plan(lengths, sequence_length, 'best_fit')
  fewest = sum(-(-length // sequence_length) for length in lengths)
  assert len(plan.lengths) == fewest


@hypothesis.given(
  st.lists(st.integers(1, 12), min_size=1, max_size=60), st.integers(12, 20)
)
def test_best_fit_puts_each_piece_where_it_leaves_the_least_room(
  lengths, sequence_length
):
  rooms = []
  for length in sorted(lengths, reverse=True):
    fitting = [room for room in rooms if room >= length]
    room = min(fitting, default=sequence_length)
    if fitting:
      rooms.remove(room)
    rooms.append(room - length)
  plan = _plan(lengths, sequence_length, 'best_fit')
  used = np.add.reduceat(plan.lengths, plan.piece_offsets[:-1])
  assert sorted(sequence_length - used) == sorted(rooms)


def test_sequences_come_in_the_order_of_their_first_document():
  lengths = np.random.default_rng(0).integers(1, 30, 200)
  plan = _plan(lengths, 32, 'best_fit')
  firsts = plan.starts[plan.piece_offsets[:-1]]
  assert np.all(np.diff(firsts) > 0)


@pytest.mark.parametrize('how', ['best_fit', 'split'])
def test_a_hundred_million_tokens_are_planned_in_seconds(how):
  lengths = np.random.default_rng(0).integers(1, 4000, 50_000)
  starts = np.cumsum(lengths) - lengths
  plan = packing.make_plan(starts, lengths, sequence_length=1024, packing=how)
  assert plan.num_tokens == lengths.sum()
  assert plan.num_tokens / (plan.num_sequences * 1024) > 0.99
