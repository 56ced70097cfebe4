"""Batches hold what the plan says; masks fall where and as often as meant."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm.data import batches, packing, tokenizer

_BYTES = tokenizer.ByteTokenizer()
_PADDING = 258
_END = 257


def _filled(lengths, sequence_length, how):
  """All sequences; a token's number is its place, so it says whose it is."""
  lengths = np.array(lengths, np.int64)
  starts = np.cumsum(lengths) - lengths
  plan = packing.make_plan(
    starts, lengths, sequence_length=sequence_length, packing=how
  )
  batch = batches.padding(plan.num_sequences, sequence_length, pad_id=-1)
  sequences = np.arange(plan.num_sequences)
  batches.fill(
    batch,
    sequences,
    plan=plan,
    tokens=np.arange(lengths.sum()),
    sequences=sequences,
  )
  document = np.repeat(np.arange(len(lengths)), lengths)
  return batch, document, starts + lengths - 1


_CASES = hypothesis.given(
  st.lists(st.integers(1, 30), min_size=1, max_size=40),
  st.integers(2, 16),
  st.sampled_from(['best_fit', 'split']),
)


@_CASES
def test_a_segment_holds_one_document_and_counts_positions_from_zero(
  lengths, sequence_length, how
):
  batch, document, _ = _filled(lengths, sequence_length, how)
  for tokens, segments, positions in zip(
    batch['tokens'], batch['segment_ids'], batch['positions'], strict=True
  ):
    present = sorted(set(segments.tolist()) - {0})
    assert present == list(range(1, len(present) + 1))
    for segment in present:
      inside = tokens[segments == segment]
      assert len(set(document[inside].tolist())) == 1
      assert np.all(np.diff(inside) == 1)
      assert positions[segments == segment].tolist() == list(range(len(inside)))


@_CASES
def test_padding_comes_last_and_is_empty(lengths, sequence_length, how):
  batch, _, _ = _filled(lengths, sequence_length, how)
  is_padding = batch['segment_ids'] == 0
  assert np.array_equal(is_padding, np.sort(is_padding, axis=1))
  assert np.array_equal(is_padding, batch['tokens'] == -1)
  assert np.all(batch['loss_weights'][is_padding] == 0)
  assert np.all(batch['targets'][is_padding] == -1)


@_CASES
def test_every_token_but_a_documents_first_is_a_target_once(
  lengths, sequence_length, how
):
  batch, _, lasts = _filled(lengths, sequence_length, how)
  counts = batch['loss_weights'] > 0
  targets = batch['targets'][counts]
  assert np.array_equal(targets, batch['tokens'][counts] + 1)
  firsts = {0, *(lasts[:-1] + 1).tolist()}
  wanted = sorted(set(range(sum(lengths))) - firsts)
  assert sorted(targets.tolist()) == wanted


def _masked(keys, *, seed=0, sequence_length=1000):
  rng = np.random.default_rng(1)
  batch = batches.padding(len(keys), sequence_length, pad_id=_PADDING)
  tokens = rng.integers(0, 256, batch['tokens'].shape).astype(np.int32)
  tokens[:, ::10] = _END
  batch['tokens'] = tokens
  batch['segment_ids'][:, :-100] = 1
  batches.Masker(_BYTES, seed=seed)(batch, np.array(keys))
  return batch, tokens


def test_fifteen_percent_are_predicted_and_shown_as_bert_shows_them():
  batch, tokens = _masked(range(200))
  may_be_chosen = (batch['segment_ids'] > 0) & (tokens < 256)
  chosen = batch['loss_weights'] > 0
  assert not np.any(chosen & ~may_be_chosen)
  num_chosen = chosen.sum()
  # Four standard deviations of the binomial counts below.
  assert num_chosen / may_be_chosen.sum() == pytest.approx(0.15, abs=0.004)
  shown = batch['tokens'][chosen]
  hidden = np.mean(shown == _BYTES.mask_id)
  kept = np.mean(shown == tokens[chosen])
  # A random byte is the right one once in 256 times.
  assert hidden == pytest.approx(0.8, abs=0.011)
  assert kept == pytest.approx(0.1 + 0.1 / 256, abs=0.009)
  assert np.all((shown < 256) | (shown == _BYTES.mask_id))
  replaced = shown[(shown != _BYTES.mask_id) & (shown != tokens[chosen])]
  assert len(np.unique(replaced)) == 256


def test_masking_changes_nothing_else():
  batch, tokens = _masked(range(10))
  assert np.array_equal(batch['targets'], tokens)
  unchosen = batch['loss_weights'] == 0
  assert np.array_equal(batch['tokens'][unchosen], tokens[unchosen])


def test_masks_follow_from_seed_and_key_alone():
  batch, _ = _masked([3, 4, 3])
  again, _ = _masked([4, 5, 3])
  other_seed, _ = _masked([3, 4, 3], seed=1)
  weights = batch['loss_weights']
  assert np.array_equal(weights[2], again['loss_weights'][2])
  assert not np.array_equal(weights[0], weights[1])
  assert not np.array_equal(weights, other_seed['loss_weights'])


def test_masking_without_a_mask_token_is_refused():
  encoder = tokenizer.ByteTokenizer()
  encoder.mask_id = None
  with pytest.raises(ValueError, match=r'needs a tokenizer with a mask token'):
    batches.Masker(encoder, seed=0)
