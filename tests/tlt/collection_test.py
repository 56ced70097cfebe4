"""Rounds of problems until enough groups are informative."""

import collections
from collections.abc import Callable

import numpy as np
import pytest

from efficient_llm.tlt import (
  collection,
  problems,
  rewards,
  rollout,
  spot_trainer,
)

_TEACHES, _DOES_NOT, _FAILED = [0.0, 1.0], [1.0, 1.0], [np.nan, 1.0]


def _answered(
  first_problem: int, rewards_GN: list[list[float]]
) -> collection.Answered:
  """Answers of one token, the number of their problem."""
  groups_N = np.repeat(np.arange(len(rewards_GN)) + first_problem, 2)
  scores = np.ravel(rewards_GN)
  count = len(groups_N)
  return collection.Answered(
    problems.Prompts(
      texts=[f'problem {group}' for group in groups_N],
      answers=[''] * count,
      tokens_NP=groups_N[:, None],
      lengths_N=np.ones(count, np.int32),
      groups_N=groups_N,
    ),
    rollout.Outcome(
      tokens_NT=groups_N[:, None],
      lengths_N=np.ones(count, np.int32),
      log_probs_NT=np.zeros((count, 1)),
      ended_N=np.ones(count, bool),
      num_tokens=count,
      secs=2.0,
      worker_secs=(1.0, 2.0),
      num_passes=5,
      num_decoded=7,
      rounds_by_shape={'0_1_1': 3},
      rounds_by_size={count: 3},
      compile_secs=0.5,
      saved_secs=0.0,
      training=spot_trainer.Effort(num_steps=first_problem),
    ),
    rewards.Scores(
      rewards_N=scores,
      unparsable_N=np.zeros(count, bool),
      failed_N=np.isnan(scores),
      failures=('one',) if np.isnan(scores).any() else (),
      secs=1.0,
    ),
    # Every other token comes from a step before.
    drawn_NT=5 - np.arange(count)[:, None] % 2,
  )


def _source(
  *kinds: list[float],
) -> tuple[Callable[[int], collection.Answered], list[int]]:
  """Problems whose answers have these rewards, and what was asked for."""
  waiting, asked = collections.deque(kinds), []

  def answer(num_problems: int) -> collection.Answered:
    asked.append(num_problems)
    first = len(kinds) - len(waiting)
    return _answered(first, [waiting.popleft() for _ in range(num_problems)])

  return answer, asked


def _used(found: collection.Collected) -> list[int]:
  return found.rollouts(step=0).groups_N.tolist()


def test_a_single_round_keeps_all_but_failed_groups() -> None:
  answer, asked = _source(_TEACHES, _DOES_NOT, _FAILED)
  found = collection.collect(answer, num_wanted=3, max_rounds=1)
  assert asked == [3]
  assert _used(found) == [0, 0, 1, 1]
  assert found.metrics(0.5, step=6) == {
    'answer_rounds': 1,
    'problems_answered': 3,
    'problems_informative': 1,
    'problems_used': 1,
    'used': pytest.approx(1 / 3),
    'policy_staleness_mean': 1.5,
    'policy_staleness_max': 2,
  }


def test_further_problems_replace_uninformative_and_failed_ones() -> None:
  answer, asked = _source(
    _TEACHES, _DOES_NOT, _FAILED, _DOES_NOT, *[_TEACHES] * 4
  )
  found = collection.collect(answer, num_wanted=4, max_rounds=3)
  assert asked == [4, 4]
  # Five are informative; the update is on as many as were wanted.
  assert _used(found) == [0, 0, 4, 4, 5, 5, 6, 6]
  assert found.metrics(0.5, step=6) == {
    'answer_rounds': 2,
    'problems_answered': 8,
    'problems_informative': 5,
    'problems_used': 4,
    'used': 0.25,
    'policy_staleness_mean': 1.5,
    'policy_staleness_max': 2,
  }


def test_a_further_round_is_as_large_as_experience_says() -> None:
  """Two of three were informative, so for one more two are answered."""
  answer, asked = _source(_TEACHES, _DOES_NOT, _TEACHES, _TEACHES, _TEACHES)
  found = collection.collect(answer, num_wanted=3, max_rounds=2)
  assert asked == [3, 2]
  assert _used(found) == [0, 0, 2, 2, 3, 3]


def test_no_more_rounds_than_allowed_are_answered() -> None:
  answer, asked = _source(*[_DOES_NOT] * 5, _TEACHES)
  found = collection.collect(answer, num_wanted=2, max_rounds=3)
  assert asked == [2, 2, 2]
  assert _used(found) == [5, 5]


def test_a_step_that_has_enough_answers_no_further_round() -> None:
  answer, asked = _source(_TEACHES, _TEACHES)
  collection.collect(answer, num_wanted=2, max_rounds=3)
  assert len(asked) == 1


def test_what_rounds_took_is_added_up() -> None:
  answer, _ = _source(*[_FAILED] * 2, *[_TEACHES] * 2)
  whole = collection.collect(answer, num_wanted=2, max_rounds=2).answered
  assert whole.prompts.texts == [
    f'problem {n}' for n in (0, 0, 1, 1, 2, 2, 3, 3)
  ]
  assert whole.outcome.tokens_NT[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
  assert whole.outcome.secs == 4
  assert whole.outcome.worker_secs == (2, 4)
  assert whole.outcome.idle_secs == 2
  assert whole.outcome.num_passes == 10
  assert whole.outcome.rounds_by_size == {4: 6}
  # The drafter counts its effort from the beginning of the step itself.
  assert whole.outcome.training.num_steps == 2
  assert whole.scores.failures == ('one',)
  np.testing.assert_array_equal(
    whole.scores.failed_N, [True, False] * 2 + [False] * 4
  )


@pytest.mark.parametrize('max_rounds', [1, 2])
def test_answers_are_drawn_for_the_problems_they_belong_to(
  max_rounds: int,
) -> None:
  answer, _ = _source(_DOES_NOT, *[_TEACHES] * 3)
  found = collection.collect(answer, num_wanted=2, max_rounds=max_rounds)
  rollouts = found.rollouts(step=3)
  np.testing.assert_array_equal(rollouts.prompts_NP, rollouts.tokens_NT)
  np.testing.assert_array_equal(rollouts.prompts_NP[:, 0], rollouts.groups_N)
