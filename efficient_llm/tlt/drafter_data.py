"""The answers that a drafter is trained on, of this step and the one before."""

import collections
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from efficient_llm import typing
from efficient_llm.data import batches as data_batches
from efficient_llm.data import packing


class DrafterData:
  """Answers tagged by the step of the run; for threads.

  Answers come in while others are still being written, so those of this moment
  are the short ones: the long ones of the step before stand in for what is
  missing (one-step-off). Older ones are forgotten.

  Source: Hu et al. 2025 (TLT), section on the spot trainer, arXiv:2511.16665.
    Differs: of the step before only answers longer than all of this one's.
  """

  def __init__(
    self,
    *,
    batch_size: int,
    sequence_length: int,
    pad_id: int,
    max_texts: int,
    seed: int,
  ):
    """Starts without answers.

    Args:
      batch_size: Rows of a batch.
      sequence_length: Tokens in a row; holds the longest answer.
      pad_id: Of the tokenizer.
      max_texts: Answers of a step that are kept.
      seed: Of the choice among them.
    """
    self._batch_size, self._sequence_length = batch_size, sequence_length
    self._pad_id, self._max_texts = pad_id, max_texts
    self._rng = np.random.default_rng(seed)
    self._lock = threading.Lock()
    self._texts: collections.deque[list[np.ndarray]] = collections.deque(
      [[]], maxlen=2
    )

  def begin_step(self) -> None:
    with self._lock:
      self._texts.append([])

  def add(self, text: np.ndarray) -> None:
    """Adds an answer with its prompt."""
    with self._lock:
      newest = self._texts[-1]
      if len(newest) < self._max_texts and len(text) > 1:
        newest.append(text)

  def replace(self, texts: Sequence[np.ndarray]) -> None:
    """Puts all answers of this step in place of those that it saw."""
    with self._lock:
      self._texts[-1].clear()
    for text in texts:
      self.add(text)

  def empty_batch(self) -> data_batches.Batch:
    """A batch of the usual shape that holds nothing."""
    return data_batches.padding(
      self._batch_size, self._sequence_length, pad_id=self._pad_id
    )

  def batch(self) -> typing.Batch | None:
    """Answers packed in isolation, drawn anew every time; None without any."""
    with self._lock:
      *before, now = [list(x) for x in self._texts]
    longest_now = max((len(text) for text in now), default=0)
    chosen = [text for x in before for text in x if len(text) > longest_now]
    chosen += now
    if not chosen:
      return None
    lengths = np.asarray([len(text) for text in chosen])
    plan = packing.make_plan(
      np.cumsum(lengths) - lengths,
      lengths,
      sequence_length=self._sequence_length,
      packing='best_fit',
    )
    num_rows = min(self._batch_size, plan.num_sequences)
    batch = self.empty_batch()
    data_batches.fill(
      batch,
      np.arange(num_rows),
      plan=plan,
      tokens=np.concatenate(chosen),
      sequences=self._rng.permutation(plan.num_sequences)[:num_rows],
    )
    return batch

  def get_state(self) -> dict[str, Any]:
    """As JSON can hold it."""
    with self._lock:
      return {
        'texts': [[text.tolist() for text in x] for x in self._texts],
        'rng': self._rng.bit_generator.state,
      }

  def set_state(self, saved: dict[str, Any]) -> None:
    """Goes on from `get_state`."""
    self._texts = collections.deque(
      [[np.asarray(text, np.int32) for text in x] for x in saved['texts']],
      maxlen=2,
    )
    self._rng.bit_generator.state = saved['rng']
