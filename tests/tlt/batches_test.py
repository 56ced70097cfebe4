"""Tests of rollouts and their packed batches: places, weights, errors."""

from typing import Any

import numpy as np
import pytest

from efficient_llm.tlt import batches


def _rollouts() -> batches.Rollouts:
  """Three answers; no token id occurs twice, 0 is padding."""
  return batches.Rollouts(
    prompts_NP=np.array([[1, 2, 0], [3, 0, 0], [4, 5, 6]], np.int32),
    prompt_lengths_N=np.array([2, 1, 3]),
    tokens_NT=np.array([[11, 12, 13, 0], [14, 0, 0, 0], [15, 16, 0, 0]]),
    lengths_N=np.array([3, 1, 2]),
    log_probs_NT=-np.array(
      [[1.1, 1.2, 1.3, 0], [1.4, 0, 0, 0], [1.5, 1.6, 0, 0]]
    ),
    rewards_N=np.array([1.0, 0.0, 0.5]),
    groups_N=np.array([0, 0, 1]),
    step=3,
  )


def _pack(rollouts: batches.Rollouts | None = None, **changes: Any) -> Any:
  rollouts = rollouts or _rollouts()
  options = {'sequence_length': 8, 'aggregation': 'token', **changes}
  advantages = np.arange(1.0, rollouts.num_answers + 1)
  return batches.pack(rollouts, advantages, **options)


def test_rows_hold_prompts_with_their_completions() -> None:
  batch = _pack()
  # Longest first, each where least room is left: 5, 5, then 2 behind the first.
  np.testing.assert_array_equal(
    batch['tokens'],
    [[1, 2, 11, 12, 13, 3, 14, 0], [4, 5, 6, 15, 16, 0, 0, 0]],
  )
  np.testing.assert_array_equal(
    batch['segment_ids'],
    [[1, 1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0]],
  )
  np.testing.assert_array_equal(
    batch['positions'],
    [[0, 1, 2, 3, 4, 0, 1, 0], [0, 1, 2, 3, 4, 0, 0, 0]],
  )


def test_the_last_prompt_token_has_the_first_completion_token_as_target() -> (
  None
):
  batch = _pack()
  counts = batch['loss_weights'] > 0
  np.testing.assert_array_equal(
    counts,
    np.array([[0, 1, 1, 1, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]], bool),
  )
  # In the order of the rows: all completion tokens and nothing else.
  np.testing.assert_array_equal(
    batch['targets'][counts], [11, 12, 13, 14, 15, 16]
  )
  np.testing.assert_array_equal(batch['tokens'][counts], [2, 11, 12, 3, 6, 15])


def test_values_of_a_token_stand_where_it_is_the_target() -> None:
  old = np.arange(12.0).reshape(3, 4)
  batch = _pack(old_log_probs_NT=old, reference_log_probs_NT=old + 100)
  counts = batch['loss_weights'] > 0
  wanted = {
    'rollout_log_probs': [-1.1, -1.2, -1.3, -1.4, -1.5, -1.6],
    'advantages': [1, 1, 1, 2, 3, 3],
    'old_log_probs': [0, 1, 2, 4, 8, 9],
    'reference_log_probs': [100, 101, 102, 104, 108, 109],
  }
  for name, values in wanted.items():
    assert batch[name].dtype == np.float32
    np.testing.assert_allclose(batch[name][counts], values)
    assert not batch[name][~counts].any()


def test_what_is_not_given_is_not_in_the_batch() -> None:
  assert not {'old_log_probs', 'reference_log_probs'} & set(_pack())


@pytest.mark.parametrize(
  ('aggregation', 'wanted'),
  [
    # Six tokens in three answers of 3, 1 and 2 tokens, at most 4 allowed.
    ('token', [1, 1, 1]),
    ('sequence', [6 / (3 * 3), 6 / (3 * 1), 6 / (3 * 2)]),
    ('constant', [6 / (3 * 4)] * 3),
  ],
)
def test_the_weights_are_those_of_the_aggregation(
  aggregation: str, wanted: list[float]
) -> None:
  rollouts = _rollouts()
  batch = _pack(rollouts, aggregation=aggregation, max_completion_tokens=4)
  found = batches.unpack(batch['loss_weights'], rollouts)
  for row, (weight, length) in enumerate(
    zip(wanted, rollouts.lengths_N, strict=True)
  ):
    np.testing.assert_allclose(found[row, :length], weight, rtol=1e-6)


def _random_rollouts(seed: int) -> batches.Rollouts:
  rng = np.random.default_rng(seed)
  num_answers, num_prompt, num_tokens = 40, 7, 9
  lengths = rng.integers(1, num_tokens + 1, num_answers)
  tokens = rng.integers(1, 99, (num_answers, num_tokens))
  tokens[np.arange(num_tokens) >= lengths[:, None]] = 0
  return batches.Rollouts(
    prompts_NP=rng.integers(1, 99, (num_answers, num_prompt)),
    prompt_lengths_N=rng.integers(1, num_prompt + 1, num_answers),
    tokens_NT=tokens,
    lengths_N=lengths,
    log_probs_NT=-rng.random((num_answers, num_tokens)),
    rewards_N=rng.random(num_answers),
    groups_N=np.arange(num_answers) // 4,
    step=0,
  )


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('sequence_length', [16, 50])
def test_unpacking_gives_each_answer_its_own_again(
  seed: int, sequence_length: int
) -> None:
  rollouts = _random_rollouts(seed)
  batch = _pack(rollouts, sequence_length=sequence_length, num_rows_multiple=8)
  mask = rollouts.completion_mask_NT
  np.testing.assert_array_equal(
    batches.unpack(batch['targets'], rollouts), rollouts.tokens_NT
  )
  np.testing.assert_allclose(
    batches.unpack(batch['rollout_log_probs'], rollouts),
    np.where(mask, rollouts.log_probs_NT, 0),
    rtol=1e-6,
  )
  assert np.count_nonzero(batch['loss_weights']) == rollouts.num_tokens


def test_rows_that_hold_nothing_fill_up_to_a_multiple() -> None:
  batch = _pack(num_rows_multiple=4, pad_id=9)
  assert batch['tokens'].shape == (4, 8)
  assert (batch['tokens'][2:] == 9).all()
  assert not batch['segment_ids'][2:].any()
  assert not batch['loss_weights'][2:].any()


def test_the_number_of_rows_can_be_demanded() -> None:
  assert _pack(num_rows=6, num_rows_multiple=3)['tokens'].shape == (6, 8)


@pytest.mark.parametrize(('num_rows', 'multiple'), [(1, 1), (3, 2)])
def test_a_number_of_rows_that_cannot_be_is_refused(
  num_rows: int, multiple: int
) -> None:
  with pytest.raises(
    ValueError, match=r'at least the 2 rows .* set num_rows=2'
  ):
    _pack(num_rows=num_rows, num_rows_multiple=multiple)


def test_an_answer_longer_than_a_row_is_refused() -> None:
  assert _pack(sequence_length=5)['tokens'].shape == (3, 5)
  with pytest.raises(ValueError, match='answer 0 have 5 tokens and must fit'):
    _pack(sequence_length=4)


@pytest.mark.parametrize('longest', [None, 2])
def test_a_constant_that_is_no_limit_of_the_answers_is_refused(
  longest: int | None,
) -> None:
  with pytest.raises(ValueError, match='at least the longest completion, 3'):
    _pack(aggregation='constant', max_completion_tokens=longest)


def test_a_batch_without_answers_is_refused() -> None:
  nobody = _rollouts().take(np.zeros(3, bool))
  with pytest.raises(ValueError, match='at least one answer'):
    _pack(nobody)


def test_log_probs_of_another_shape_are_refused() -> None:
  with pytest.raises(ValueError, match='old_log_probs_NT must have the shape'):
    _pack(old_log_probs_NT=np.zeros((3, 5)))


def test_advantages_of_another_number_are_refused() -> None:
  with pytest.raises(ValueError, match=r'advantages_N must have shape \(3,\)'):
    batches.pack(
      _rollouts(), np.zeros(2), sequence_length=8, aggregation='token'
    )


@pytest.mark.parametrize('rows', [[2, 0], [True, False, True]])
def test_taking_rows_takes_them_of_everything(rows: list) -> None:
  rollouts = _rollouts()
  taken = rollouts.take(np.array(rows))
  numbers = np.arange(3)[np.array(rows)]
  assert taken.step == 3
  assert taken.num_tokens == 5
  for name in ('prompts_NP', 'prompt_lengths_N', 'tokens_NT', 'lengths_N'):
    np.testing.assert_array_equal(
      getattr(taken, name), getattr(rollouts, name)[numbers]
    )
  for name in ('log_probs_NT', 'rewards_N', 'groups_N'):
    np.testing.assert_array_equal(
      getattr(taken, name), getattr(rollouts, name)[numbers]
    )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'lengths_N': np.array([3, 0, 2])}, 'lengths_N must be from 1 to 4'),
    ({'lengths_N': np.array([3, 5, 2])}, 'lengths_N must be from 1 to 4'),
    (
      {'prompt_lengths_N': np.array([4, 1, 1])},
      'prompt_lengths_N must be from 1 to 3',
    ),
    ({'rewards_N': np.zeros(2)}, 'rewards_N must have the shape'),
    ({'groups_N': np.zeros((3, 1))}, 'groups_N must have the shape'),
    ({'log_probs_NT': np.zeros((3, 3))}, 'log_probs_NT must have the shape'),
  ],
)
def test_rollouts_that_do_not_fit_together_are_refused(
  changes: dict[str, np.ndarray], message: str
) -> None:
  with pytest.raises(ValueError, match=message):
    batches.Rollouts(**{**vars(_rollouts()), **changes})
