"""Rollouts: workers side by side answer the prompts of one step.

All workers take answers from one queue, so none idles while an answer waits to
be begun. One that finds none left trains the drafter until the last answer
ends; the others take up what it learnt between two stretches of rounds.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from efficient_llm import typing
from efficient_llm.models import transformer
from efficient_llm.speculative import continuation, engine
from efficient_llm.speculative import generation as generation_lib
from efficient_llm.speculative import row_queue as row_queue_lib
from efficient_llm.speculative import strategy as strategy_lib
from efficient_llm.tlt import (
  backlog,
  rollout_config,
  rollout_worker,
  spot_trainer,
  texts,
)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The answers of a step, row by row, and what they took.

  Attributes:
    tokens_NT: Completions, 0 behind the end.
    lengths_N: Their tokens, those of earlier steps included.
    log_probs_NT: Under the law each token was drawn from.
    ended_N: Completions that are complete.
    num_tokens: Drawn in this step.
    secs: Until the last answer and training have ended, without compilation.
    worker_secs: Of each worker, until it found no answer left.
    num_passes: Target passes, counted for every live row.
    num_decoded: Tokens that did not come with a prompt.
    rounds_by_shape: Rounds that each draft shape ran, by name.
    rounds_by_size: Rounds of batches of each size.
    compile_secs: Of the worker that compiled longest.
    saved_secs: Of all workers, estimated; see `generation_lib.Stats`.
    training: What the spot trainer did meanwhile.
  """

  tokens_NT: np.ndarray
  lengths_N: np.ndarray
  log_probs_NT: np.ndarray
  ended_N: np.ndarray
  num_tokens: int
  secs: float
  worker_secs: tuple[float, ...]
  num_passes: int
  num_decoded: int
  rounds_by_shape: dict[str, int]
  rounds_by_size: dict[int, int]
  compile_secs: float
  saved_secs: float
  training: spot_trainer.Effort

  @property
  def idle_secs(self) -> float:
    """Of workers with no answer left, until the step goes on.

    The drafter's last training step is in it, for which all workers wait.
    """
    return sum(self.secs - secs for secs in self.worker_secs)

  @property
  def acceptance_length(self) -> float:
    """New tokens per target pass and row."""
    return self.num_decoded / max(1, self.num_passes)

  def continued(self, begun: backlog.Answers, *, step: int) -> backlog.Answers:
    """What these answers have become in a step."""
    return begun.continued(
      self.tokens_NT,
      self.lengths_N,
      self.log_probs_NT,
      self.ended_N,
      step=step,
    )

  def take(self, rows: np.ndarray) -> 'Outcome':
    """Some of the answers; what they took together stays."""
    return dataclasses.replace(
      self,
      tokens_NT=self.tokens_NT[rows],
      lengths_N=self.lengths_N[rows],
      log_probs_NT=self.log_probs_NT[rows],
      ended_N=self.ended_N[rows],
    )


class Workers:
  """Engines on devices; lives as long as the run, as they hold programs."""

  def __init__(
    self,
    config: rollout_config.RolloutConfig,
    model: transformer.TransformerConfig,
    *,
    stop_tokens: tuple[int, ...],
    devices: Sequence[Any],
  ):
    """Makes a worker for each device.

    Args:
      config: Checked here.
      model: The policy.
      stop_tokens: Of the tokenizer.
      devices: Each holds a whole policy.
    """
    config.validate()
    self._config = config
    self._sampling = dataclasses.replace(
      config.sampling, stop_tokens=stop_tokens
    )
    drafter = rollout_worker.drafter(config.speculation, model)
    self._workers = []
    for device in devices:
      chooser = strategy_lib.Strategy(config.strategy)
      machine = engine.Engine(
        model,
        drafter=drafter,
        chooser=None if drafter is None else chooser,
        max_batch=config.max_live,
        rounds_at_once=config.rounds_at_once,
        max_kept_prompts=config.max_kept_prompts,
      )
      self._workers.append(
        rollout_worker.Worker(
          device, machine, chooser, config.speculation, self._sampling
        )
      )

  def run(
    self,
    params: typing.Params,
    prompts_NP: np.ndarray,
    prompt_lengths_N: np.ndarray,
    groups_N: np.ndarray,
    key: jax.Array,
    *,
    draft_params: typing.Params | None,
    trainer: spot_trainer.SpotTrainer | None,
    use_model: bool = True,
    begun: backlog.Answers | None = None,
    num_whole: int | None = None,
    rows: np.ndarray | None = None,
    ended: threading.Event | None = None,
  ) -> Outcome:
    """Answers every row once.

    Args:
      params: The policy's.
      prompts_NP: A prompt for each answer, padded on the right.
      prompt_lengths_N: Real tokens.
      groups_N: The same number for answers to one prompt.
      key: A typed random key, or one for each row; row n draws with the coins
        of row n whatever worker it falls to.
      draft_params: Of the draft model, where speculation needs one.
      trainer: Whose drafter is trained by workers without answers; None lets
        them idle.
      use_model: Whether rounds may use the draft model; once they may not,
        they never do again.
      begun: What earlier steps have left of the answers.
      num_whole: Ends when so many groups are complete, where the others stand;
        None answers all.
      rows: Only these are answered; the others' arrays are 0.
      ended: Set with the last answer; the drafter is trained until it is set.
    """
    if begun is None:
      coins_NC = backlog.coins(0, len(groups_N))
      longest = self._sampling.max_new_tokens
      begun = backlog.Answers.new(groups_N, coins_NC, longest)
    pool = texts.TextPool(
      self._config.num_texts,
      prompts_NP.shape[1] + self._sampling.max_new_tokens,
    )
    shared = rollout_worker.Shared(
      params=params,
      prompts_NP=prompts_NP,
      prompt_lengths_N=prompt_lengths_N,
      groups_N=groups_N,
      key=key,
      draft_params=draft_params,
      use_model=use_model,
      queue=row_queue_lib.RowQueue(backlog.order(begun, rows)),
      begun=continuation.Begun(begun.tokens_NT, begun.lengths_N),
      ended_N=begun.ended_N.copy(),
      num_whole=num_whole,
      pool=pool,
      trainer=trainer,
      num_busy=len(self._workers),
      ended=threading.Event() if ended is None else ended,
    )
    for row in np.flatnonzero(begun.ended_N).tolist():
      shared.add_text(row, begun.tokens_NT[row, : begun.lengths_N[row]])
    shared.check_enough()
    found: dict[int, tuple[generation_lib.Generation, float]] = {}
    start = time.perf_counter()

    def work(index: int) -> None:
      try:
        found[index] = self._workers[index].answer(shared)
      # Whatever it is, the others must not wait for this worker.
      except BaseException as error:
        shared.fail(error)

    threads = [
      threading.Thread(target=work, args=(i,), daemon=True)
      for i in range(len(self._workers))
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    secs = time.perf_counter() - start
    if shared.failure is not None:
      raise shared.failure
    return self._collect(
      list(found.values()),
      begun=begun,
      start=start,
      secs=secs,
      trainer=trainer,
    )

  def get_state(self) -> list[dict[str, Any]]:
    """What the bandits have learnt, as JSON can hold it."""
    return [worker.chooser.to_dict() for worker in self._workers]

  def set_state(self, saved: list[dict[str, Any]]) -> None:
    """Goes on from `get_state`, of as many workers or fewer."""
    for worker, state in zip(self._workers, saved, strict=False):
      worker.chooser.restore(state)

  def _collect(
    self,
    found: list[tuple[generation_lib.Generation, float]],
    *,
    begun: backlog.Answers,
    start: float,
    secs: float,
    trainer: spot_trainer.SpotTrainer | None,
  ) -> Outcome:
    """Every token was drawn by one worker and is 0 with the others."""
    generations = [generation for generation, _ in found]
    completions = [x.completion for x in generations]
    stats = [x.stats for x in generations]
    # Workers compile side by side; what they waited for is not rollout.
    compile_secs = max(s.compile_secs for s in stats)
    rounds: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[int] = collections.Counter()
    for one in stats:
      sizes.update(one.rounds_by_size)
      rounds.update({s.name: n for s, n in one.rounds_by_shape.items()})

    def total(*parts: Any) -> np.ndarray:
      # Of the same type, lest the next step compile for another one.
      return np.sum(parts, 0, dtype=parts[0].dtype)

    return Outcome(
      tokens_NT=total(begun.tokens_NT, *(x.tokens for x in completions)),
      lengths_N=total(begun.lengths_N, *(x.lengths for x in completions)),
      log_probs_NT=total(
        begun.log_probs_NT, *(x.log_probs for x in completions)
      ),
      ended_N=np.any([begun.ended_N, *(x.ended_N for x in generations)], 0),
      num_tokens=sum(s.num_tokens for s in stats),
      secs=secs - compile_secs,
      worker_secs=tuple(end - start - compile_secs for _, end in found),
      num_passes=sum(s.num_passes for s in stats),
      num_decoded=sum(s.num_decoded for s in stats),
      rounds_by_shape=dict(rounds),
      rounds_by_size=dict(sizes),
      compile_secs=compile_secs,
      saved_secs=sum(s.saved_secs for s in stats),
      training=(
        spot_trainer.Effort() if trainer is None else trainer.take_effort()
      ),
    )
