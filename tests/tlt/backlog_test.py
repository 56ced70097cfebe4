"""What a step leaves is gone on with, and used once it is whole."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm.models import sampling
from efficient_llm.tlt import backlog


def _backlog(group_size: int = 2, num_tokens: int = 4) -> backlog.Backlog:
  return backlog.Backlog(group_size=group_size, num_tokens=num_tokens)


def _draw(
  answers: backlog.Answers, new: list[int], ended: list[int], step: int
) -> backlog.Answers:
  """Answers with so many tokens more, of which those named are complete."""
  lengths_N = answers.lengths_N + np.asarray(new)
  places_T = np.arange(answers.tokens_NT.shape[1])
  is_new = places_T >= answers.lengths_N[:, None]
  is_new &= places_T < lengths_N[:, None]
  return answers.continued(
    np.where(is_new, 10 * step + places_T, answers.tokens_NT).astype(np.int32),
    lengths_N.astype(np.int32),
    np.where(is_new, -0.1 * step, answers.log_probs_NT).astype(np.float32),
    answers.ended_N | np.isin(np.arange(len(new)), ended),
    step=step,
  )


def _two_steps() -> backlog.Backlog:
  """Three problems, of which step 0 uses the second."""
  kept = _backlog()
  begun = kept.fill(3, num_wanted=3, step=0)
  assert begun.groups_N.tolist() == [0, 0, 1, 1, 2, 2]
  after = _draw(begun, [1, 2, 3, 2, 0, 1], ended=[1, 2, 3], step=0)
  used = kept.use(after, most_groups=2)
  assert used.tolist() == [False, False, True, True, False, False]
  return kept


def test_unfinished_groups_stay_whole_and_new_problems_fill_up() -> None:
  kept = _two_steps()
  begun = kept.fill(3, num_wanted=3, step=1)
  assert begun.groups_N.tolist() == [0, 0, 2, 2, 3, 3]
  assert begun.lengths_N.tolist() == [1, 2, 0, 1, 0, 0]
  assert begun.ended_N.tolist() == [False, True] + [False] * 4
  assert kept.metrics() == {
    'kept_answers': 3,
    'kept_tokens': 4,
    'deferred_problems': 0,
  }


def test_every_token_knows_its_step_and_probability() -> None:
  kept = _two_steps()
  after = _draw(
    kept.fill(3, num_wanted=3, step=1), [2, 0, 1, 1, 1, 1], ended=[0], step=1
  )
  used = after.take(kept.use(after, most_groups=2))
  assert used.groups_N.tolist() == [0, 0]
  assert used.tokens_NT.tolist() == [[0, 11, 12, 0], [0, 1, 0, 0]]
  assert used.drawn_NT.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
  np.testing.assert_allclose(used.log_probs_NT[0], [0.0, -0.1, -0.1, 0.0])


def test_complete_groups_beyond_those_used_wait_their_turn() -> None:
  kept = _backlog()
  after = _draw(
    kept.fill(3, num_wanted=3, step=0), [1] * 6, ended=list(range(6)), step=0
  )
  assert after.take(kept.use(after, most_groups=2)).groups.tolist() == [0, 1]
  assert kept.answers.whole_groups.tolist() == [2]
  # No problem is begun while as many are in flight.
  assert kept.fill(1, num_wanted=1, step=1).groups.tolist() == [2]
  assert kept.next_problem == 3


def test_deferred_problems_wait_for_a_step_of_their_own() -> None:
  kept = backlog.Backlog(group_size=2, num_tokens=4, defers=True)
  for step in (0, 1):
    begun = kept.fill(3, num_wanted=2, step=step)
    # Two problems of three are answered, the second is the long one.
    ended = [0, 1, 4, 5]
    after = _draw(begun, [1, 1, 4, 3, 1, 1], ended=ended, step=step)
    used = after.take(kept.use(after, most_groups=2))
    assert used.groups.tolist() == [3 * step, 3 * step + 2]
  assert kept.metrics()['deferred_problems'] == 2
  # A stop in between loses none.
  other = backlog.Backlog(group_size=2, num_tokens=4, defers=True)
  other.set_state(json.loads(json.dumps(kept.get_state())))
  begun = other.fill(3, num_wanted=2, step=2)
  assert begun.groups_N.tolist() == [1, 1, 4, 4]
  # Anew, so that no token is of an older policy.
  assert not begun.lengths_N.any()
  assert begun.coins_NC[:, 0].tolist() == [2] * 4
  after = _draw(begun, [4] * 4, ended=[0, 1, 2, 3], step=2)
  assert other.use(after, most_groups=2).all()
  assert other.fill(3, num_wanted=2, step=3).groups.tolist() == [6, 7, 8]


def test_what_waits_is_answered_when_the_setting_changes() -> None:
  kept = backlog.Backlog(group_size=2, num_tokens=4, defers=True)
  after = _draw(
    kept.fill(3, num_wanted=2, step=0),
    [1, 1, 4, 3, 1, 1],
    ended=[0, 1, 4, 5],
    step=0,
  )
  kept.use(after, most_groups=2)
  goes_on = _backlog()
  goes_on.set_state(kept.get_state())
  assert goes_on.fill(3, num_wanted=2, step=1).groups.tolist() == [1, 3, 4]
  assert goes_on.deferred == []
  # The other way round, what was begun begins anew.
  waits = backlog.Backlog(group_size=2, num_tokens=4, defers=True)
  waits.set_state(_two_steps().get_state())
  begun = waits.fill(3, num_wanted=2, step=1)
  assert begun.groups.tolist() == [0, 2]
  assert not begun.lengths_N.any()


def test_no_two_answers_have_the_same_coins() -> None:
  kept, seen = _backlog(), []
  for step in (0, 0, 1, 2):
    begun = kept.fill(3, num_wanted=3, step=step)
    seen += begun.coins_NC[begun.lengths_N == 0].tolist()
    ended = np.flatnonzero(begun.groups_N <= begun.groups[0]).tolist()
    kept.use(_draw(begun, [1] * 6, ended, step), most_groups=3)
  coins = {tuple(x) for x in seen}
  assert len(coins) == len(seen) == 12
  keys = backlog.keys(7, np.asarray(seen))
  assert len(np.unique(jax.random.key_data(keys), axis=0)) == 12


def test_an_answer_keeps_its_coins() -> None:
  kept = _two_steps()
  before = kept.answers.coins_NC.tolist()
  assert kept.fill(3, num_wanted=3, step=1).coins_NC.tolist()[:4] == before


def test_coins_are_those_of_rows_of_a_step() -> None:
  rows = sampling.row_keys(jax.random.fold_in(jax.random.key(3), 5), 4)
  named = backlog.keys(3, backlog.coins(5, 4))
  np.testing.assert_array_equal(
    jax.random.key_data(rows), jax.random.key_data(named)
  )


def test_a_saved_backlog_goes_on_bit_by_bit() -> None:
  kept, other = _two_steps(), _backlog()
  log_probs_NT = np.full((4, 4), np.float32(-1 / 3))
  kept.answers = dataclasses.replace(
    kept.answers,
    log_probs_NT=np.where(
      np.arange(4) < kept.answers.lengths_N[:, None], log_probs_NT, 0
    ).astype(np.float32),
  )
  other.set_state(json.loads(json.dumps(kept.get_state())))
  for field in dataclasses.fields(backlog.Answers):
    ours = getattr(other.fill(3, num_wanted=3, step=1), field.name)
    expected = getattr(kept.fill(3, num_wanted=3, step=1), field.name)
    np.testing.assert_array_equal(ours, expected)
    assert ours.dtype == expected.dtype
  assert other.next_problem == kept.next_problem


@pytest.mark.parametrize(
  ('change', 'remedy'),
  [({'group_size': 3}, 'set it to 2'), ({'num_tokens': 1}, 'set it to 2 or')],
)
def test_answers_that_do_not_fit_the_settings_are_refused(
  change: dict[str, Any], remedy: str
) -> None:
  with pytest.raises(ValueError, match=remedy):
    _backlog(**change).set_state(_two_steps().get_state())
