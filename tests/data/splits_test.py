"""What is validated on is never trained on."""

import dataclasses

import numpy as np
import pytest

from efficient_llm.data import splits, token_cache


def _cache(hashes, length=100):
  hashes = np.array(hashes, np.uint64)
  lengths = np.full(len(hashes), length, np.int64)
  return token_cache.TokenCache(
    tokens=np.zeros(lengths.sum(), np.uint16),
    starts=np.cumsum(lengths) - lengths,
    lengths=lengths,
    num_bytes=lengths - 2,
    files=np.arange(len(hashes)) // 10,
    content_hashes=hashes,
    num_invalid_utf8=0,
    fingerprint='',
  )


def _hashes(seed, count):
  bits = np.random.default_rng(seed).integers(0, 1 << 63, count, np.uint64)
  return bits * np.uint64(2)


def _tokens(part):
  return {
    int(token)
    for start, length in zip(part.starts, part.lengths, strict=True)
    for token in range(start, start + length)
  }


@pytest.mark.parametrize('count', [1, 5, 400])
def test_the_splits_share_no_token_and_miss_none(count):
  cache = _cache(_hashes(0, count))
  [train] = splits.divide([cache], split='train', fraction=0.05)
  [validation] = splits.divide([cache], split='validation', fraction=0.05)
  assert not _tokens(train) & _tokens(validation)
  assert _tokens(train) | _tokens(validation) == set(range(len(cache.tokens)))
  assert len(validation.starts)


def test_many_documents_are_held_out_whole_by_their_hash():
  cache = _cache(_hashes(0, 4000), length=3)
  [part] = splits.divide([cache], split='validation', fraction=0.05)
  assert set(part.lengths.tolist()) == {3}
  # Four standard deviations of a binomial of 4000 draws.
  assert len(part.starts) / 4000 == pytest.approx(0.05, abs=0.014)


def test_more_text_moves_no_document():
  hashes = _hashes(0, 400)
  before, after = (
    splits.divide([_cache(h)], split='validation', fraction=0.1)[0].starts
    for h in (hashes, np.concatenate([hashes, _hashes(1, 400)]))
  )
  assert set(before.tolist()) == {s for s in after.tolist() if s < 40_000}


def test_equal_texts_of_several_sources_go_together():
  hashes = _hashes(0, 400)
  caches = [_cache(hashes), _cache(hashes[::-1])]
  first, second = splits.divide(caches, split='train', fraction=0.1)
  kept = {int(hashes[s // 100]) for s in first.starts}
  assert kept == {int(hashes[::-1][s // 100]) for s in second.starts}


def test_few_documents_hold_out_the_tail_of_each():
  cache = _cache(_hashes(0, 2))
  [train] = splits.divide([cache], split='train', fraction=0.05)
  [validation] = splits.divide([cache], split='validation', fraction=0.05)
  assert train.lengths.tolist() == [95, 95]
  assert validation.starts.tolist() == [95, 195]
  assert validation.cuts_tails


def test_text_whose_tail_is_held_out_is_in_no_other_source():
  shared = _hashes(0, 1)
  others = _hashes(1, 400)
  caches = [_cache(shared), _cache(np.concatenate([shared, others]))]
  for split in ('train', 'validation'):
    _, large = splits.divide(caches, split=split, fraction=0.05)
    assert 0 not in large.starts


def test_other_validation_text_is_left_out_of_training():
  hashes = _hashes(0, 10)
  part = splits.without(_cache(hashes), _cache(hashes[3:5]))
  assert part.starts.tolist() == [0, 100, 200, 500, 600, 700, 800, 900]


def test_validating_on_nothing_is_refused():
  caches = [_cache(_hashes(0, 10))]
  with pytest.raises(ValueError, match=r'set data\.validation_fraction'):
    splits.divide(caches, split='validation', fraction=0)
  [part] = splits.divide(caches, split='train', fraction=0)
  assert len(part.starts) == 10


def _shares(parts, sharding, count):
  return [
    splits.share_of_island(
      parts, [1.0] * len(parts), island=(i, count), sharding=sharding
    )
    for i in range(count)
  ]


def test_islands_part_the_files_among_them():
  parts = [splits.everything(_cache(_hashes(0, 100)))]
  shares = _shares(parts, 'files', 3)
  files = [set(mine[0].files.tolist()) for mine, _ in shares]
  assert sorted(f for share in files for f in share) == list(range(10))


def test_islands_part_the_sources_among_them():
  parts = [splits.everything(_cache(_hashes(0, 10 + i))) for i in range(3)]
  shares = _shares(parts, 'sources', 2)
  sizes = [[len(part.starts) for part in mine] for mine, _ in shares]
  assert sizes == [[10, 12], [11]]


@pytest.mark.parametrize('sharding', ['files', 'sources'])
def test_an_island_without_text_is_refused(sharding):
  part = splits.everything(_cache(_hashes(0, 10)))
  part = dataclasses.replace(part, files=np.zeros(10, np.int64))
  with pytest.raises(ValueError, match='must have text of its own'):
    _shares([part], sharding, 2)
