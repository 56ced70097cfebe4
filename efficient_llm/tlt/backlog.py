"""Answers that are not yet used: what a step leaves for those after it.

A step that does not wait for the longest answers keeps them with the tokens
there are, the log-probabilities these were drawn with, and the step of each.
They go on in the next step under the policy that there is then; a group is used
once all its answers are complete. Or it defers their problems: once enough of
these wait, a step answers them alone and anew, to the end, so that no token is
of an older policy.

Source: partial rollouts of Kimi Team 2025, Kimi k1.5, arXiv:2501.12599, and
Zhou et al. 2025, APRIL, arXiv:2509.18521; tail batching of Gao et al. 2025,
RollPacker, arXiv:2509.21009.
"""

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Answers:
  """Answers as far as they are, those of a group side by side.

  Attributes:
    groups_N: Number of the problem in the run.
    coins_NC: The step that began the answer and its number there: C is 2.
    tokens_NT: 0 behind the end.
    lengths_N: Their tokens.
    log_probs_NT: Under the law each token was drawn from.
    drawn_NT: Step of the run at whose parameters each token was drawn.
    ended_N: Whether the answer is complete.
  """

  groups_N: np.ndarray
  coins_NC: np.ndarray
  tokens_NT: np.ndarray
  lengths_N: np.ndarray
  log_probs_NT: np.ndarray
  drawn_NT: np.ndarray
  ended_N: np.ndarray

  @classmethod
  def new(
    cls, groups_N: np.ndarray, coins_NC: np.ndarray, num_tokens: int
  ) -> 'Answers':
    """Answers without a token, with room for so many."""
    count = len(groups_N)
    return cls(
      groups_N=groups_N,
      coins_NC=coins_NC,
      tokens_NT=np.zeros((count, num_tokens), np.int32),
      lengths_N=np.zeros(count, np.int32),
      log_probs_NT=np.zeros((count, num_tokens), np.float32),
      drawn_NT=np.zeros((count, num_tokens), np.int32),
      ended_N=np.zeros(count, bool),
    )

  @property
  def groups(self) -> np.ndarray:
    """The groups, in the order of the problems."""
    return np.unique(self.groups_N)

  @property
  def whole_groups(self) -> np.ndarray:
    """Groups whose answers are all complete."""
    return whole_groups(self.groups_N, self.ended_N)

  def take(self, rows: np.ndarray) -> 'Answers':
    """Some of the answers, by number or mask."""
    return Answers(
      **{x.name: getattr(self, x.name)[rows] for x in dataclasses.fields(self)}
    )

  def then(self, others: 'Answers') -> 'Answers':
    """These, and others behind them."""
    return Answers(
      **{
        x.name: np.concatenate([getattr(self, x.name), getattr(others, x.name)])
        for x in dataclasses.fields(self)
      }
    )

  def continued(
    self,
    tokens_NT: np.ndarray,
    lengths_N: np.ndarray,
    log_probs_NT: np.ndarray,
    ended_N: np.ndarray,
    *,
    step: int,
  ) -> 'Answers':
    """The answers after a step that drew what is behind the old lengths."""
    places_T = np.arange(tokens_NT.shape[1])
    is_new_NT = places_T >= self.lengths_N[:, None]
    is_new_NT &= places_T < lengths_N[:, None]
    return dataclasses.replace(
      self,
      tokens_NT=tokens_NT,
      lengths_N=lengths_N,
      log_probs_NT=log_probs_NT,
      drawn_NT=np.where(is_new_NT, step, self.drawn_NT),
      ended_N=ended_N,
    )


class Backlog:
  """The problems of a run in order, and the answers that wait for use.

  Attributes:
    answers: Begun and not used, at most those of the groups in flight.
    next_problem: Number of the first problem that was not begun.
    deferred: Problems that wait for a step of their own, the oldest first.
  """

  def __init__(self, *, group_size: int, num_tokens: int, defers: bool = False):
    """Starts with the first problem.

    Args:
      group_size: Answers to a problem.
      num_tokens: Of the longest answer.
      defers: Whether what a step does not use begins anew.
    """
    self._group_size, self._num_tokens = group_size, num_tokens
    self._defers = defers
    self.next_problem = 0
    self.deferred: list[int] = []
    nothing = np.zeros((0, 2), int)
    self.answers = Answers.new(nothing[:, 0], nothing, num_tokens)
    # Answers that the newest step has begun; they number its coins.
    self._step, self._num_begun = -1, 0

  def fill(self, num_groups: int, *, num_wanted: int, step: int) -> Answers:
    """Begins problems until so many are in flight; gives all that are.

    Args:
      num_groups: In flight, whether begun now or before.
      num_wanted: Groups that the step waits for. Where as many were deferred,
        those alone are in flight.
      step: Of the run.
    """
    if step != self._step:
      self._step, self._num_begun = step, 0
    count = max(0, num_groups - len(self.answers.groups))
    if self._defers:
      is_enough = len(self.deferred) >= num_wanted
      chosen = self.deferred[:num_wanted] if is_enough else []
      count = 0 if is_enough else count
    else:
      # Left by a run that deferred them.
      chosen = self.deferred[:count]
      count -= len(chosen)
    self.deferred = self.deferred[len(chosen) :]
    first, self.next_problem = self.next_problem, self.next_problem + count
    chosen = [*chosen, *range(first, first + count)]
    groups_N = np.repeat(np.asarray(chosen, int), self._group_size)
    coins_NC = coins(step, len(groups_N), first=self._num_begun)
    self._num_begun += len(groups_N)
    new = Answers.new(groups_N, coins_NC, self._num_tokens)
    self.answers = self.answers.then(new)
    return self.answers

  def use(self, answers: Answers, *, most_groups: int) -> np.ndarray:
    """Keeps what the step does not use, or defers it.

    Args:
      answers: From `fill`, continued.
      most_groups: Complete groups that may be used, the oldest ones.
    Returns:
      A mask of the answers that are used.
    """
    chosen = answers.whole_groups[:most_groups]
    used_N = np.isin(answers.groups_N, chosen)
    left = answers.take(~used_N)
    if self._defers:
      self.deferred += left.groups.tolist()
      left = left.take(np.zeros(0, int))
    self.answers = left
    return used_N

  def metrics(self) -> dict[str, float]:
    """What is kept for the steps to come."""
    return {
      'kept_answers': float(np.count_nonzero(self.answers.lengths_N)),
      'kept_tokens': float(self.answers.lengths_N.sum()),
      'deferred_problems': float(len(self.deferred)),
    }

  def get_state(self) -> dict[str, Any]:
    """As JSON can hold it; float32 keeps every bit."""
    kept = self.answers

    def rows(x_NT: np.ndarray) -> list[list[Any]]:
      lengths_N = kept.lengths_N
      return [x[:n].tolist() for x, n in zip(x_NT, lengths_N, strict=True)]

    return {
      'next_problem': self.next_problem,
      'deferred': self.deferred,
      'groups': kept.groups_N.tolist(),
      'coins': kept.coins_NC.tolist(),
      'tokens': rows(kept.tokens_NT),
      'log_probs': rows(kept.log_probs_NT),
      'drawn': rows(kept.drawn_NT),
      'ended': kept.ended_N.tolist(),
    }

  def set_state(self, saved: dict[str, Any]) -> None:
    """Goes on from `get_state`.

    Raises:
      ValueError: If the answers that are kept do not go with the settings.
    """
    self.next_problem = saved['next_problem']
    self.deferred = list(saved.get('deferred', ()))
    groups_N = np.asarray(saved['groups'], int)
    lengths = list(map(len, saved['tokens']))
    if max(lengths, default=0) > self._num_tokens:
      raise ValueError(
        f'rollout.sampling.max_new_tokens={self._num_tokens} must hold the '
        f'answers that the checkpoint keeps; set it to {max(lengths)} or more.'
      )
    sizes = np.unique(groups_N, return_counts=True)[1]
    if (sizes != self._group_size).any():
      raise ValueError(
        f'rollout.group_size={self._group_size} must be that of the answers '
        f'that the checkpoint keeps; set it to {sizes[0]}.'
      )
    if self._defers:
      # Of a run that went on with them: they begin anew.
      self.deferred += np.unique(groups_N).tolist()
      return
    coins_NC = np.asarray(saved['coins'], int).reshape(-1, 2)
    kept = Answers.new(groups_N, coins_NC, self._num_tokens)
    for row, length in enumerate(lengths):
      kept.tokens_NT[row, :length] = saved['tokens'][row]
      kept.log_probs_NT[row, :length] = saved['log_probs'][row]
      kept.drawn_NT[row, :length] = saved['drawn'][row]
    self.answers = dataclasses.replace(
      kept,
      lengths_N=np.asarray(lengths, np.int32),
      ended_N=np.asarray(saved['ended'], bool),
    )


def coins(step: int, count: int, *, first: int = 0) -> np.ndarray:
  """Names of the coins of answers that a step begins, [N, 2]."""
  numbers_N = np.arange(first, first + count)
  return np.stack([np.full_like(numbers_N, step), numbers_N], 1)


def keys(seed: int, coins_NC: np.ndarray) -> jax.Array:
  """The random keys of answers, by the names of their coins."""
  steps_N, numbers_N = coins_NC.astype(np.uint32).T
  fold_in = jax.random.fold_in
  keys_N = jax.vmap(fold_in, (None, 0))(jax.random.key(seed), steps_N)
  return jax.vmap(fold_in)(keys_N, numbers_N)


def whole_groups(groups_N: np.ndarray, ended_N: np.ndarray) -> np.ndarray:
  """Groups whose answers are all complete, in order."""
  return np.setdiff1d(groups_N, groups_N[~ended_N])


def order(begun: Answers, some: np.ndarray | None = None) -> list[int]:
  """Rows to answer: first what was begun, as it is long, then one of a group.

  After one answer of every group comes a second: later ones copy earlier ones.

  Args:
    begun: The answers as far as they are.
    some: The rows to choose from; all where None.
  """
  rows = np.argsort(begun.groups_N, kind='stable')
  rows = rows[~begun.ended_N[rows]]
  rows = rows if some is None else rows[np.isin(rows, some)]
  _, first, group_N = np.unique(
    begun.groups_N[rows], return_index=True, return_inverse=True
  )
  place_N = np.arange(len(rows)) - first[group_N]
  rows = rows[np.argsort(place_N, kind='stable')]
  is_new = begun.lengths_N[rows] == 0
  return rows[np.argsort(is_new, kind='stable')].tolist()
