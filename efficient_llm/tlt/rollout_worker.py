"""A worker of a rollout: an engine on a device, and what workers share."""

import dataclasses
import functools
import threading
import time
from typing import Any

import jax
import numpy as np

from efficient_llm.models import sampling as sampling_lib
from efficient_llm.models import transformer
from efficient_llm.speculative import (
  continuation,
  drafting,
  engine,
  model_draft,
  row_queue,
  strategy,
)
from efficient_llm.speculative import generation as generation_lib
from efficient_llm.speculative import state as state_lib
from efficient_llm.tlt import backlog, rollout_config, spot_trainer, texts


def drafter(
  speculation: rollout_config.Speculation, model: transformer.TransformerConfig
) -> state_lib.Drafter | None:
  """How a worker drafts; None for plain decoding."""
  if speculation == 'off':
    return None
  if speculation == 'ngram':
    return drafting.model_free()
  if speculation == 'learned':
    return model_draft.drafter(model)
  return drafting.union(model)


@dataclasses.dataclass
class Shared:
  """What the workers of one step share.

  Attributes:
    key: Row n draws with the coins of row n whatever worker it falls to.
    queue: Answers that nobody has taken yet.
    begun: What earlier steps have left of the answers.
    ended_N: Answers that are complete.
    num_whole: Complete groups that end the step; None for all.
    pool: Finished answers to copy from.
    use_model: Whether rounds may use the draft model.
    num_busy: Workers that may still find an answer.
    enough: Set as soon as so many groups are complete.
    ended: Set with the last answer, or a failure.
  """

  params: Any
  prompts_NP: np.ndarray
  prompt_lengths_N: np.ndarray
  groups_N: np.ndarray
  key: Any
  draft_params: Any
  use_model: bool
  queue: row_queue.RowQueue
  begun: continuation.Begun
  ended_N: np.ndarray
  num_whole: int | None
  pool: texts.TextPool
  trainer: spot_trainer.SpotTrainer | None
  num_busy: int
  enough: threading.Event = dataclasses.field(default_factory=threading.Event)
  ended: threading.Event = dataclasses.field(default_factory=threading.Event)
  lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
  failure: BaseException | None = None

  def fail(self, error: BaseException) -> None:
    """Ends the step for all workers, between two stretches of rounds."""
    self.failure = error
    self.queue.close()
    self.ended.set()

  def add_text(self, row: int, tokens: np.ndarray) -> np.ndarray:
    """Lets others of the group copy from a complete answer; gives its text."""
    length = self.prompt_lengths_N[row]
    text = np.concatenate([self.prompts_NP[row, :length], tokens])
    self.pool.add(int(self.groups_N[row]), text)
    return text

  def check_enough(self) -> None:
    """Ends the step where enough groups are complete."""
    if self.num_whole is not None:
      whole = backlog.whole_groups(self.groups_N, self.ended_N)
      if len(whole) >= self.num_whole:
        self.enough.set()

  def finish(self, row: int, tokens: np.ndarray) -> None:
    """Enters a complete answer."""
    text = self.add_text(row, tokens)
    if self.trainer is not None:
      self.trainer.data.add(text)
    with self.lock:
      self.ended_N[row] = True
      self.check_enough()


@dataclasses.dataclass
class Worker:
  """An engine on a device, and its bandit."""

  device: Any
  engine: engine.Engine
  chooser: strategy.Strategy
  speculation: rollout_config.Speculation
  sampling: sampling_lib.SamplingConfig

  def answer(self, shared: Shared) -> tuple[generation_lib.Generation, float]:
    """Answers until none is left, then trains the drafter till the end."""
    if not shared.use_model:
      self.chooser.leave_out_model()
    with jax.default_device(self.device):
      place = functools.partial(jax.device_put, device=self.device)
      generation = self.engine.generate(
        place(shared.params),
        shared.prompts_NP,
        shared.prompt_lengths_N,
        self.sampling,
        place(shared.key),
        draft_params=self._draft_params(shared, place),
        groups_N=shared.groups_N,
        refresh=self._refresh(shared, place),
        finished=shared.finish,
        queue=shared.queue,
        begun=shared.begun,
        stop=shared.enough.is_set,
      )
      end = time.perf_counter()
      with shared.lock:
        shared.num_busy -= 1
        if not shared.num_busy:
          shared.ended.set()
      if shared.trainer is not None:
        shared.trainer.train_until(shared.ended, self.device)
    return generation, end

  def _draft_params(self, shared: Shared, place: Any) -> Any:
    copied = place(shared.pool.arrays())
    return {
      'off': lambda: None,
      'ngram': lambda: copied,
      'learned': lambda: place(shared.draft_params),
      'union': lambda: {
        'learned': place(shared.draft_params),
        'model_free': copied,
      },
    }[self.speculation]()

  def _refresh(
    self, shared: Shared, place: Any
  ) -> generation_lib.Refresh | None:
    """What a worker asks between stretches: newer texts, a newer drafter."""
    copies = self.speculation in ('ngram', 'union')
    learns = self.speculation in ('learned', 'union')
    trainer = shared.trainer if learns else None
    if not copies and trainer is None:
      return None
    seen = [0, 0 if trainer is None else trainer.version]

    def refresh() -> generation_lib.Refreshed | None:
      newer_texts = newer_drafter = None
      if trainer is not None and not trainer.is_healthy:
        self.chooser.leave_out_model()
      if copies and shared.pool.version != seen[0]:
        seen[0] = shared.pool.version
        newer_texts = place(shared.pool.arrays())
      if trainer is not None and trainer.version != seen[1]:
        seen[1], published = trainer.published()
        newer_drafter = place(published)
        if self.speculation == 'union':
          newer_drafter = {
            'learned': newer_drafter,
            'model_free': place(shared.pool.arrays()),
          }
      if newer_texts is None and newer_drafter is None:
        return None
      return generation_lib.Refreshed(
        draft_params=newer_drafter, texts=newer_texts
      )

    return refresh
