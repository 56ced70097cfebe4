"""The answers of a step: rounds of problems until enough groups teach.

A group whose rewards are all equal teaches nothing, so that a batch of them
shrinks as the policy learns. Dynamic sampling answers further problems in their
place.
"""

import collections
import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from efficient_llm.tlt import advantages, batches, problems, rewards, rollout

_Part = TypeVar('_Part', problems.Prompts, rollout.Outcome, rewards.Scores)


@dataclasses.dataclass(frozen=True)
class Answered:
  """Problems, their answers and rewards, row by row.

  Attributes:
    prompts: Whose groups are those of no other round.
    outcome: The answers and what they took.
    scores: The rewards.
    drawn_NT: Step of the run at whose parameters each token was drawn.
  """

  prompts: problems.Prompts
  outcome: rollout.Outcome
  scores: rewards.Scores
  drawn_NT: np.ndarray

  @property
  def num_problems(self) -> int:
    return len(np.unique(self.prompts.groups_N))

  @property
  def informative_groups(self) -> np.ndarray:
    """Groups without a failed reward whose rewards are not all equal."""
    groups_N = self.prompts.groups_N
    is_informative_N = advantages.informative(self.scores.rewards_N, groups_N)
    return np.unique(groups_N[is_informative_N])


@dataclasses.dataclass(frozen=True)
class Collected:
  """The answers of a step.

  Attributes:
    answered: All rounds as one.
    used_N: Which answers are for the update.
    num_rounds: Rounds that were answered.
  """

  answered: Answered
  used_N: np.ndarray
  num_rounds: int

  def rollouts(self, *, step: int) -> batches.Rollouts:
    """The answers that are for the update of a step."""
    prompts, outcome = self.answered.prompts, self.answered.outcome
    whole = batches.Rollouts(
      prompts_NP=prompts.tokens_NP,
      prompt_lengths_N=prompts.lengths_N,
      tokens_NT=outcome.tokens_NT,
      lengths_N=outcome.lengths_N,
      log_probs_NT=outcome.log_probs_NT,
      rewards_N=self.answered.scores.rewards_N,
      groups_N=prompts.groups_N,
      step=step,
      drawn_NT=self.answered.drawn_NT,
    )
    return whole.take(self.used_N)

  def metrics(self, used: float, *, step: int) -> dict[str, float]:
    """How much was answered for how much that is trained on, and its age.

    Args:
      used: Share of the answers for the update that were trained on.
      step: Of the run.
    """
    staleness = self.rollouts(step=step).staleness
    mean = staleness.mean() if len(staleness) else 0.0
    informative = self.answered.informative_groups
    kept = np.isin(informative, self.answered.prompts.groups_N[self.used_N])
    return {
      'answer_rounds': float(self.num_rounds),
      'problems_answered': float(self.answered.num_problems),
      'problems_informative': float(len(informative)),
      'problems_used': float(kept.sum()),
      'used': used * float(self.used_N.mean()),
      'policy_staleness_mean': float(mean),
      'policy_staleness_max': float(staleness.max(initial=0)),
    }


# Answers so many problems.
AnswerRound = Callable[[int], Answered]


def collect(
  answer: AnswerRound, *, num_wanted: int, max_rounds: int
) -> Collected:
  """Answers rounds until enough groups are informative.

  The first round has as many problems as are wanted, a further one as many as
  will do if as large a part of it is informative as of those before. Of more
  informative groups than are wanted the last ones are left out, so that every
  update is on the same number. With a single round all answers are for the
  update but those whose reward failed.

  Args:
    answer: Answers the next problems.
    num_wanted: Informative groups for an update.
    max_rounds: Most rounds; after them the update makes do with what there is.
  Source: dynamic sampling of Yu et al. 2025, DAPO, section 3.2,
    arXiv:2503.14476. Differs: later rounds are no larger than they need be.
  """
  rounds: list[Answered] = []
  num_problems = num_informative = 0
  while len(rounds) < max_rounds and num_informative < num_wanted:
    num_next = num_wanted
    if num_informative:
      missing = num_wanted - num_informative
      num_next = min(num_wanted, -(-missing * num_problems // num_informative))
    found = answer(num_next)
    rounds.append(found)
    num_problems += found.num_problems
    num_informative += len(found.informative_groups)
  merged = merge(rounds)
  groups_N, failed_N = merged.prompts.groups_N, merged.scores.failed_N
  used_N = ~np.isin(groups_N, groups_N[failed_N])
  if max_rounds > 1:
    used_N = np.isin(groups_N, merged.informative_groups[:num_wanted])
  return Collected(merged, used_N, len(rounds))


def merge(rounds: Sequence[Answered]) -> Answered:
  """Rounds one behind the other as one."""
  if len(rounds) == 1:
    return rounds[0]
  outcomes = [x.outcome for x in rounds]
  workers = zip(*(x.worker_secs for x in outcomes), strict=True)
  return Answered(
    _joined([x.prompts for x in rounds]),
    # The drafter's effort is counted from the beginning of the step.
    _joined(
      outcomes,
      worker_secs=tuple(map(sum, workers)),
      training=outcomes[-1].training,
    ),
    _joined([x.scores for x in rounds]),
    np.concatenate([x.drawn_NT for x in rounds]),
  )


def _joined(parts: Sequence[_Part], **given: Any) -> _Part:
  """Fields one behind the other, or summed where they are numbers."""
  fields = {}
  for field in dataclasses.fields(parts[0]):
    values = [getattr(part, field.name) for part in parts]
    if field.name in given:
      fields[field.name] = given[field.name]
    elif isinstance(values[0], np.ndarray):
      fields[field.name] = np.concatenate(values)
    elif isinstance(values[0], dict):
      counts = sum(map(collections.Counter, values), collections.Counter())
      fields[field.name] = dict(counts)
    else:
      fields[field.name] = functools.reduce(operator.add, values)
  return dataclasses.replace(parts[0], **fields)
