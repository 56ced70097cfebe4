"""Tests of the islands' text: what each sees, and where it goes on."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

from efficient_llm.data import pipeline
from efficient_llm.diloco import batches
from efficient_llm.diloco.config import MembershipConfig
from efficient_llm.diloco.schedule import Schedule
from tests import tiny
from tests.diloco import islands


@pytest.fixture(scope='module')
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return tiny.write_text(tmp_path_factory.mktemp('text'))


def _open(
  text: pathlib.Path, number: int = 2, data: Any = None, **changes: Any
) -> batches.IslandBatches:
  config = islands.config(
    text,
    cache_dir=text.parent,
    islands=number,
    membership=MembershipConfig(**changes),
  )
  settings = dataclasses.replace(
    config.data, **{'batch_size': 2, **(data or {})}
  )
  return batches.IslandBatches(
    pipeline.open_dataset(settings),
    Schedule(config),
    num_islands=number,
    local=range(number),
  )


def _rows(batch: Any) -> list[bytes]:
  rows = batch['tokens'].reshape(-1, batch['tokens'].shape[-1])
  weights = batch['loss_weights'].reshape(len(rows), -1).sum(1)
  return [
    row.tobytes() for row, weight in zip(rows, weights, strict=True) if weight
  ]


def test_islands_see_what_one_with_a_larger_batch_would(
  text: pathlib.Path,
) -> None:
  with _open(text, 2) as two, _open(text, 1, {'batch_size': 4}) as one:
    for _ in range(3):
      assert sorted(_rows(next(two))) == sorted(_rows(next(one)))


def test_a_resting_island_gets_no_weight_and_stays_where_it_is(
  text: pathlib.Path,
) -> None:
  with (
    _open(text) as always,
    _open(text, absences=('1:2:3',)) as with_rest,
  ):
    whole = [next(always) for _ in range(4)]
    some = [next(with_rest) for _ in range(4)]
  for step in (1, 2):
    assert some[step]['loss_weights'][1].sum() == 0
  np.testing.assert_array_equal(some[3]['tokens'][1], whole[1]['tokens'][1])
  np.testing.assert_array_equal(some[3]['tokens'][0], whole[3]['tokens'][0])


def test_a_restored_iterator_goes_on_where_each_island_was(
  text: pathlib.Path,
) -> None:
  with _open(text, speeds=(1.0, 0.5)) as first:
    for _ in range(3):
      next(first)
    state = first.get_state()
    expected = [next(first) for _ in range(3)]
  assert state['next_steps'] == [3, 1]
  with _open(text, speeds=(1.0, 0.5)) as second:
    second.set_state(state)
    for batch in expected:
      np.testing.assert_array_equal(next(second)['tokens'], batch['tokens'])


@pytest.mark.parametrize(('old', 'new'), [(2, 4), (4, 2), (2, 3)])
def test_another_number_of_islands_repeats_nothing(
  text: pathlib.Path, old: int, new: int
) -> None:
  with _open(text, old) as first:
    seen = [row for _ in range(2) for row in _rows(next(first))]
    state = first.get_state()
  with _open(text, new) as second:
    second.set_state(state)
    later = [row for _ in range(2) for row in _rows(next(second))]
  assert not set(seen) & set(later)


def test_a_state_of_plain_training_is_refused(text: pathlib.Path) -> None:
  with (
    _open(text) as islanders,
    pytest.raises(ValueError, match='must be of a run with islands'),
  ):
    islanders.set_state({'next_step': 3, 'next_example': 12})


@pytest.mark.parametrize('sharding', ['files', 'sources'])
def test_islands_may_have_text_of_their_own(
  tmp_path: pathlib.Path, sharding: str
) -> None:
  words = ('aaaa ', 'bbbb ')
  paths = [tmp_path / f'{word.strip()}.txt' for word in words]
  for path, word in zip(paths, words, strict=True):
    path.write_text('\n'.join([word * 30] * 40))
  where = {'path': str(tmp_path / '*.txt')}
  if sharding == 'sources':
    where = {'path': 'stdlib', 'sources': tuple(map(str, paths))}
  data = {**where, 'island_sharding': sharding, 'validation_fraction': 0.0}
  with _open(paths[0], data=data) as islanders:
    batch = next(islanders)
  letters = [
    {chr(t) for t in batch['tokens'][m].ravel() if chr(t) in 'ab'}
    for m in range(2)
  ]
  assert letters[0].isdisjoint(letters[1])
  assert letters[0] | letters[1] == {'a', 'b'}
