"""Rollouts that several processes share, each on devices of its own.

A step's problems are dealt out, whole groups to each process. All rows keep
their numbers and draw with the coins of their numbers, so the answers are the
same however many processes there are. Once all have ended, every process
knows every answer and every reward, and all of them make the same update.

A process without answers trains the drafter until the last process has none.
Several may do so, each on the answers that it has seen; all go on with the
drafter of the one that made most steps. A drafter reaches other processes
between steps of the run, never within one.
"""

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from efficient_llm import sharding, typing
from efficient_llm.tlt import (
  drafter_data,
  problems,
  rewards,
  rollout,
  spot_trainer,
)
from efficient_llm.training import processes, rendezvous

_T = TypeVar('_T')


class AllEnded(threading.Event):
  """Is set once every process has set its own; devices need not wait for it.

  Make and wait for one in all processes alike.
  """

  def __init__(self, *, timeout_secs: float):
    """Waits for nobody yet.

    Args:
      timeout_secs: How long the first to end waits for the last. Then it is
        set all the same, and the next meeting of the processes says who is
        missing.
    """
    super().__init__()
    self._timeout_secs = timeout_secs
    self._rendezvous = rendezvous.Rendezvous()
    self._first = threading.Lock()

  def set(self) -> None:
    """Says that this process has ended; others may be at work still."""
    if self._first.acquire(blocking=False):
      threading.Thread(target=self._meet, daemon=True).start()

  def _meet(self) -> None:
    # Whatever it was, the processes hear of it where they meet next.
    with contextlib.suppress(Exception):
      self._rendezvous.exchange(None, timeout_secs=self._timeout_secs)
    super().set()


class Hosts:
  """What the processes of a run do together; with one it is the plain thing.

  All processes make the same calls in the same order, each with tasks that do
  not need the others: one that fails ends the step in all.
  """

  def __init__(self, mesh: Mesh, *, timeout_secs: float):
    """Compiles nothing yet.

    Args:
      mesh: All devices.
      timeout_secs: How long the first process to end waits for the last.
    """
    self._timeout_secs = timeout_secs
    self._count, self._index = jax.process_count(), jax.process_index()
    self._replicated = jax.jit(
      lambda params: params, out_shardings=sharding.replicated(mesh)
    )

  def on_all(self, task: Callable[[], _T]) -> list[_T]:
    """See `processes.on_all`."""
    return processes.on_all(task, timeout_secs=self._timeout_secs)

  def whole(self, params: typing.Params) -> typing.Params:
    """The parameters, whole on a device of this process."""
    if self._count == 1:
      return params
    return jax.tree.map(
      lambda x: x.addressable_data(0), self._replicated(params)
    )

  def answer(
    self,
    task: Callable[[np.ndarray, threading.Event], rollout.Outcome],
    groups_N: np.ndarray,
  ) -> rollout.Outcome:
    """Has every process answer its rows; all get all answers.

    Args:
      task: Answers the rows of these numbers; sets the event at their end and
        goes on with what idle time is for until it is set.
      groups_N: Number of each row's problem.
    """
    rows = deal(groups_N, self._count)
    if self._count == 1:
      return task(rows[0], threading.Event())
    own, ended = rows[self._index], AllEnded(timeout_secs=self._timeout_secs)

    def answer_own() -> rollout.Outcome:
      try:
        return _only(task(own, ended), own)
      finally:
        # However it ended, the others need not train any longer.
        ended.set()

    return merge_outcomes(self.on_all(answer_own), rows)

  def score(
    self, task: Callable[[np.ndarray], rewards.Scores], groups_N: np.ndarray
  ) -> rewards.Scores:
    """Has every process reward its rows; all get all rewards.

    Args:
      task: Rewards the rows of these numbers.
      groups_N: Number of each row's problem.
    """
    rows = deal(groups_N, self._count)
    return merge_scores(self.on_all(lambda: task(rows[self._index])), rows)

  def share_answers(
    self,
    data: drafter_data.DrafterData,
    prompts: problems.Prompts,
    answered: rollout.Outcome,
  ) -> None:
    """Gives the drafter of every process the answers of all, in their order."""
    if self._count > 1:
      texts = zip(
        prompts.tokens_NP,
        prompts.lengths_N,
        answered.tokens_NT,
        answered.lengths_N,
        strict=True,
      )
      data.replace(
        [
          np.concatenate([prompt[:length], tokens[:num_tokens]])
          for prompt, length, tokens, num_tokens in texts
        ]
      )

  def finish_drafter(
    self, spot: spot_trainer.SpotTrainer, last: Callable[[], None]
  ) -> spot_trainer.Effort:
    """Ends a step of the run with the same drafter in every process.

    Args:
      spot: Of this process; takes over the state of the one that trained most.
      last: A stage of training that only the first process goes through.
    Returns:
      What all processes did in this step.
    """

    def train() -> tuple[spot_trainer.Effort, bool, int]:
      if self._index == 0:
        last()
      return spot.take_effort(), spot.is_healthy, spot.staleness

    found = self.on_all(train)
    if self._count == 1:
      return found[0][0]
    efforts = [effort for effort, _, _ in found]
    source = _busiest(efforts)
    spot.is_healthy = all(is_healthy for _, is_healthy, _ in found)
    if efforts[source].num_steps:
      spot.restore(
        multihost_utils.broadcast_one_to_all(
          spot.state, is_source=self._index == source
        )
      )
      spot.staleness = found[source][2]
    return merge_efforts(efforts)


def deal(groups_N: np.ndarray, count: int) -> list[np.ndarray]:
  """Numbers of each process's rows: every `count`-th group, whole.

  Args:
    groups_N: Number of each row's problem, from 0.
    count: Of processes; those beyond the number of groups get no rows.
  """
  return [np.flatnonzero(groups_N % count == index) for index in range(count)]


def merge_outcomes(
  outcomes: Sequence[rollout.Outcome], rows: Sequence[np.ndarray]
) -> rollout.Outcome:
  """One outcome of all processes, whose seconds are those of the slowest.

  Args:
    outcomes: Of each process, with the arrays of its own rows.
    rows: Their numbers.
  """
  # What the others waited for while one compiled is not rollout.
  compile_secs = max(x.compile_secs for x in outcomes)
  secs = max(x.secs + x.compile_secs for x in outcomes) - compile_secs
  rounds: collections.Counter[str] = collections.Counter()
  sizes: collections.Counter[int] = collections.Counter()
  for x in outcomes:
    rounds.update(x.rounds_by_shape)
    sizes.update(x.rounds_by_size)
  return rollout.Outcome(
    tokens_NT=_joined([x.tokens_NT for x in outcomes], rows),
    lengths_N=_joined([x.lengths_N for x in outcomes], rows),
    log_probs_NT=_joined([x.log_probs_NT for x in outcomes], rows),
    ended_N=_joined([x.ended_N for x in outcomes], rows),
    num_tokens=sum(x.num_tokens for x in outcomes),
    secs=secs,
    worker_secs=tuple(
      worker + x.compile_secs - compile_secs
      for x in outcomes
      for worker in x.worker_secs
    ),
    num_passes=sum(x.num_passes for x in outcomes),
    num_decoded=sum(x.num_decoded for x in outcomes),
    rounds_by_shape=dict(rounds),
    rounds_by_size=dict(sizes),
    compile_secs=compile_secs,
    saved_secs=sum(x.saved_secs for x in outcomes),
    training=merge_efforts([x.training for x in outcomes]),
  )


def merge_scores(
  scores: Sequence[rewards.Scores], rows: Sequence[np.ndarray]
) -> rewards.Scores:
  """The rewards of all processes, in the order of the rows.

  Args:
    scores: Of each process, for its own rows.
    rows: Their numbers.
  """
  return rewards.Scores(
    rewards_N=_joined([x.rewards_N for x in scores], rows),
    unparsable_N=_joined([x.unparsable_N for x in scores], rows),
    failed_N=_joined([x.failed_N for x in scores], rows),
    failures=tuple(line for x in scores for line in x.failures),
    secs=max(x.secs for x in scores),
  )


def merge_efforts(
  efforts: Sequence[spot_trainer.Effort],
) -> spot_trainer.Effort:
  """What all processes did, with the acceptance of the one that did most."""
  return spot_trainer.Effort(
    num_steps=sum(x.num_steps for x in efforts),
    secs=sum(x.secs for x in efforts),
    acceptance=efforts[_busiest(efforts)].acceptance,
    num_published=sum(x.num_published for x in efforts),
  )


def _busiest(efforts: Sequence[spot_trainer.Effort]) -> int:
  """The process that made most steps of training, the first of equals."""
  return max(range(len(efforts)), key=lambda i: efforts[i].num_steps)


def _only(outcome: rollout.Outcome, rows: np.ndarray) -> rollout.Outcome:
  return dataclasses.replace(
    outcome,
    tokens_NT=outcome.tokens_NT[rows],
    lengths_N=outcome.lengths_N[rows],
    log_probs_NT=outcome.log_probs_NT[rows],
    ended_N=outcome.ended_N[rows],
  )


def _joined(
  parts: Sequence[np.ndarray], rows: Sequence[np.ndarray]
) -> np.ndarray:
  """The rows of all processes, back in their order."""
  return np.concatenate(parts)[np.argsort(np.concatenate(rows))]
