"""A batch follows from the settings and the step, however it is come by.

Over 300 lines: all of it holds of one small data set, opened in many ways.
"""

import functools
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm.data import pipeline, splits

_WORDS = ['ant', 'bee', 'cat', 'dog', 'eel', 'fox', 'gnu', 'hen', 'ibis', 'jay']


def _write(folder, *, num_documents, word, seed=0):
  """Documents of one word each, so that a token says where it is from."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  for number in range(num_documents):
    text = f'{word} ' * int(rng.integers(1, 60)) + str(number)
    (folder / f'{number:04}.txt').write_text(text)
  return str(folder)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('pipeline')


@pytest.fixture(scope='module')
def opened(folder):
  path = _write(folder / 'text', num_documents=200, word='word')
  base = {'sequence_length': 16, 'batch_size': 12, 'validation_fraction': 0.1}

  @functools.cache
  def open_with(*, split: splits.Split = 'train', **settings):
    config = pipeline.DataConfig(**{'path': path, **base, **settings})
    return pipeline.open_dataset(
      config, split=split, cache_dir=folder / 'cache', log=lambda _: None
    )

  return open_with


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _assert_equal(found, wanted):
  assert len(found) == len(wanted)
  for one, other in zip(found, wanted, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


def _rows(batches):
  """The rows of batches that are not empty, as a list of bytes."""
  return [
    tokens.tobytes() + positions.tobytes()
    for batch in batches
    for tokens, positions, segments in zip(
      batch['tokens'], batch['positions'], batch['segment_ids'], strict=True
    )
    if segments[0]
  ]


def test_a_batch_has_the_agreed_arrays(opened):
  batch = opened().batch_at(0)
  dtypes = {name: array.dtype for name, array in batch.items()}
  whole = ('tokens', 'targets', 'segment_ids', 'positions')
  assert dtypes == {
    **dict.fromkeys(whole, np.int32),
    'loss_weights': np.float32,
  }
  assert {array.shape for array in batch.values()} == {(12, 16)}


@pytest.mark.parametrize('objective', ['causal', 'masked'])
def test_iterating_gives_the_batch_of_each_step(opened, objective):
  dataset = opened(objective=objective)
  found = _take(dataset.iterate(), 5)
  _assert_equal(found, [dataset.batch_at(step) for step in range(5)])
  _assert_equal(_take(dataset.iterate(start=3), 2), found[3:])


@pytest.mark.parametrize('split', ['train', 'validation'])
@pytest.mark.parametrize('objective', ['causal', 'masked'])
@hypothesis.settings(max_examples=15)
@hypothesis.given(done=st.integers(0, 40), ahead=st.integers(0, 3))
def test_a_restart_from_any_state_continues_exactly(
  opened, split, objective, done, ahead
):
  dataset = opened(split=split, objective=objective)
  iterator = dataset.iterate()
  _take(iterator, done)
  state = json.loads(json.dumps(iterator.get_state()))
  wanted = _take(iterator, 3)
  fresh = dataset.iterate()
  _take(fresh, ahead)
  fresh.set_state(state)
  assert fresh.get_state() == state
  _assert_equal(_take(fresh, 3), wanted)
  iterator.close()
  fresh.close()


@pytest.mark.parametrize('count', [2, 3, 4, 12])
def test_processes_together_have_the_rows_of_one(opened, count):
  dataset = opened(objective='masked')
  parts = [
    _take(dataset.iterate(process=(index, count)), 4) for index in range(count)
  ]
  joined = [
    {name: np.concatenate([p[name] for p in step]) for name in step[0]}
    for step in zip(*parts, strict=True)
  ]
  _assert_equal(joined, [dataset.batch_at(step) for step in range(4)])


def test_another_number_of_processes_continues_exactly(opened):
  dataset = opened()
  one = dataset.iterate(process=(0, 2))
  _take(one, 7)
  four = dataset.iterate(process=(3, 4))
  four.set_state(one.get_state())
  wanted = {k: v[9:] for k, v in dataset.batch_at(7).items()}
  _assert_equal([next(four)], [wanted])


def test_another_batch_size_continues_exactly(opened):
  iterator = opened().iterate()
  _take(iterator, 6)
  halved = opened(batch_size=6).iterate()
  halved.set_state(iterator.get_state())
  wanted = {k: v[:6] for k, v in opened().batch_at(6).items()}
  _assert_equal([next(halved)], [wanted])


def test_an_epoch_has_every_sequence_once_and_the_next_another_order(opened):
  dataset = opened(batch_size=1)
  count = dataset.num_sequences
  rows = _rows(_take(dataset.iterate(), 2 * count))
  assert sorted(rows[:count]) == sorted(rows[count:])
  assert rows[:count] != rows[count:]
  in_order = _rows(opened(batch_size=1, shuffle=False).iterate(repeat=False))
  assert sorted(in_order) == sorted(rows[:count])


def test_the_seed_decides_the_order(opened):
  other = opened(seed=1)
  assert _rows([opened().batch_at(0)]) != _rows([other.batch_at(0)])
  assert opened().fingerprint != other.fingerprint


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_one_pass_has_every_token_once_and_ends(opened, split):
  dataset = opened(split=split)
  batches = list(dataset.iterate(repeat=False))
  assert len(batches) == dataset.steps_per_pass
  assert {batch['tokens'].shape for batch in batches} == {(12, 16)}
  num_tokens = sum(int((b['segment_ids'] > 0).sum()) for b in batches)
  assert num_tokens == dataset.num_tokens
  assert len(_rows(batches)) == dataset.num_sequences


def test_validation_repeats_the_same_pass(opened):
  dataset = opened(split='validation', objective='masked')
  steps = dataset.steps_per_pass
  batches = _take(dataset.iterate(), 2 * steps)
  _assert_equal(batches[:steps], batches[steps:])
  assert np.all(batches[-1]['loss_weights'][-1] == 0) or (
    dataset.num_sequences % 12 == 0
  )


def test_masks_are_fresh_each_epoch(opened):
  dataset = opened(batch_size=1, objective='masked', shuffle=False)
  first = dataset.batch_at(0)
  again = dataset.batch_at(dataset.num_sequences)
  np.testing.assert_array_equal(first['targets'], again['targets'])
  different = any(
    not np.array_equal(
      dataset.batch_at(i)['loss_weights'],
      dataset.batch_at(dataset.num_sequences + i)['loss_weights'],
    )
    for i in range(10)
  )
  assert different


def test_no_document_is_in_both_splits(opened):
  texts = [
    {
      bytes(tokens[tokens < 256].astype(np.uint8))
      for batch in opened(
        split=split, sequence_length=300, batch_size=1
      ).iterate(repeat=False)
      for segment in range(1, int(batch['segment_ids'].max()) + 1)
      for tokens in [batch['tokens'][batch['segment_ids'] == segment]]
    }
    for split in ('train', 'validation')
  ]
  assert not texts[0] & texts[1]
  assert len(texts[0]) + len(texts[1]) == 200


@pytest.mark.parametrize('count', [2, 3])
def test_islands_together_have_each_sequence_of_an_epoch_once(opened, count):
  dataset = opened(batch_size=2)
  rows = []
  for index in range(count):
    iterator = dataset.iterate(island=(index, count), repeat=False)
    rows += _rows(iterator)
  assert sorted(rows) == sorted(_rows(dataset.iterate(repeat=False)))


def test_another_number_of_islands_goes_on_behind_what_was_seen(opened):
  dataset = opened(batch_size=2)
  pair = [dataset.iterate(island=(index, 2)) for index in range(2)]
  seen = [_take(iterator, 6) for iterator in pair]
  alone = dataset.iterate()
  alone.set_state(pair[0].get_state())
  assert alone.get_state()['next_step'] == 12
  rows = _rows(seen[0]) + _rows(seen[1])
  assert sorted(rows) == sorted(_rows(_take(dataset.iterate(), 12)))


@pytest.fixture(scope='module')
def sources(folder):
  return tuple(
    _write(folder / word, num_documents=40 + 60 * index, word=word, seed=index)
    for index, word in enumerate(_WORDS[:3])
  )


def _open_sources(folder, sources, **settings):
  config = pipeline.DataConfig(
    sources=sources,
    sequence_length=16,
    batch_size=10,
    validation_fraction=0.0,
    **settings,
  )
  return pipeline.open_dataset(config, cache_dir=folder / 'cache')


def _words_of(batches):
  text = bytes(
    np.concatenate([b['tokens'][b['tokens'] < 256] for b in batches]).tolist()
  )
  return [text.count(word.encode()) for word in _WORDS[:3]]


@pytest.mark.parametrize('weights', [(), (1.0, 2.0, 7.0), (0.5, 0.25, 0.25)])
def test_sources_are_mixed_by_weight(folder, sources, weights):
  dataset = _open_sources(folder, sources, weights=weights)
  counts = [0, 0, 0]
  for batch in _take(dataset.iterate(), 100):
    for row in range(10):
      words = _words_of([{'tokens': batch['tokens'][row]}])
      counts[int(np.argmax(words))] += 1
  shares = np.array(weights or (1, 1, 1)) / sum(weights or (1, 1, 1))
  # Mixing is not drawn but dealt; rows cut between two words blur it a little.
  np.testing.assert_allclose(np.array(counts) / 1000, shares, atol=0.02)


def test_islands_may_have_sources_of_their_own(folder, sources):
  dataset = _open_sources(folder, sources, island_sharding='sources')
  for index in range(3):
    iterator = dataset.iterate(island=(index, 3))
    counts = _words_of(_take(iterator, 10))
    assert [word for word, count in enumerate(counts) if count] == [index]


def test_islands_may_have_files_of_their_own(folder, sources):
  dataset = _open_sources(folder, sources[:1], island_sharding='files')
  rows = []
  for index in range(2):
    found = dataset.iterate(island=(index, 2), repeat=False)
    rows.append(sum(int((b['segment_ids'] > 0).sum()) for b in found))
  assert sum(rows) == dataset.num_tokens
  assert min(rows) > 0


def test_a_state_of_other_data_is_refused(opened):
  state = opened().iterate().get_state()
  with pytest.raises(ValueError, match='the state is of data set') as refusal:
    opened(seed=5).iterate().set_state(state)
  assert '\n' not in str(refusal.value)


@pytest.mark.parametrize(
  'change', [{'next_example': 5}, {'next_example': -12}, {'next_example': 'x'}]
)
def test_a_state_where_no_step_begins_is_refused(opened, change):
  iterator = opened().iterate()
  with pytest.raises(ValueError, match=r'next_example|must be in'):
    iterator.set_state({**iterator.get_state(), **change})


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'sequence_length': 1_000_000}, 'must fill one sequence'),
    ({'batch_size': 100_000}, 'must fill one batch'),
    ({'path': '/nowhere.txt'}, 'must exist'),
  ],
)
def test_text_that_will_not_do_is_refused(opened, settings, message):
  with pytest.raises(ValueError, match=message) as refusal:
    opened(**settings)
  assert '\n' not in str(refusal.value)


def test_processes_that_do_not_share_evenly_are_refused(opened):
  with pytest.raises(ValueError, match='must be divisible by the 5 processes'):
    opened().iterate(process=(0, 5))
  with pytest.raises(ValueError, match='must be an index below the count'):
    opened().iterate(process=(2, 2))


def test_statistics_count_what_is_there(opened):
  both = [opened(split=split) for split in ('train', 'validation')]
  found = [dataset.statistics() for dataset in both]
  assert sum(s['documents'] for s in found) == 200
  for dataset, statistics in zip(both, found, strict=True):
    # Each document has a mark at either end.
    marks = 2 * statistics['documents']
    assert statistics['tokens'] == statistics['bytes'] + marks
    assert 0.9 < statistics['packing_efficiency'] <= 1
    assert dataset.num_sequences == statistics['sequences']


def test_one_long_document_can_be_trained_and_validated_on(folder):
  (folder / 'book.txt').write_text('It was a dark night. ' * 200)
  config = pipeline.DataConfig(
    path=str(folder / 'book.txt'), sequence_length=32, batch_size=2
  )
  lines = []
  sizes = [
    pipeline.open_dataset(
      config, split=split, cache_dir=folder / 'cache', log=lines.append
    ).num_tokens
    for split in ('train', 'validation')
  ]
  assert sizes[1] / sum(sizes) == pytest.approx(0.05, abs=0.001)
  assert 'the tail of each is held out' in lines[-1]


def test_a_trained_bpe_serves_both_splits(opened):
  train, validation = (
    opened(split=split, tokenizer='bpe:300', sequence_length=8, batch_size=2)
    for split in ('train', 'validation')
  )
  assert train.tokenizer.fingerprint == validation.tokenizer.fingerprint
  assert train.statistics()['bytes_per_token'] > 1
  assert 'word' in train.tokenizer.decode(train.batch_at(0)['tokens'].flat)


def test_separate_validation_text_is_used_whole_and_not_trained_on(folder):
  text = _write(folder / 'both', num_documents=50, word='both')
  held_out = _write(folder / 'held_out', num_documents=10, word='both')
  config = pipeline.DataConfig(
    path=text, validation_path=held_out, sequence_length=16, batch_size=2
  )
  train, validation = (
    pipeline.open_dataset(config, split=split, cache_dir=folder / 'cache')
    for split in ('train', 'validation')
  )
  assert validation.statistics()['documents'] == 10
  assert train.statistics()['documents'] == 40
