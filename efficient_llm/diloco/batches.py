"""Data for islands: each has its own, and knows where it stands in it."""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from efficient_llm.data import dataset as dataset_lib
from efficient_llm.data import iterator
from efficient_llm.diloco.schedule import Schedule


class IslandBatches(contextlib.AbstractContextManager):
  """Iterates over batches [M, B, T] of this process's islands.

  An island that does not train in a step gets rows without weight and stays
  where it is, so every island sees each of its examples once.

  Args:
    dataset: The data.
    schedule: Says who trains.
    num_islands: Of the whole run.
    local: The islands of this process.
    process: Index and number of the processes that share an island's rows.
  """

  def __init__(
    self,
    dataset: dataset_lib.Dataset,
    schedule: Schedule,
    *,
    num_islands: int,
    local: range,
    process: tuple[int, int] = (0, 1),
  ):
    self._dataset, self._schedule = dataset, schedule
    self._num_islands, self._local = num_islands, local
    self._num_rows = dataset.config.batch_size // process[1]
    self._iterators: list[iterator.BatchIterator] = [
      dataset.iterate(process=process, island=(m, num_islands)) for m in local
    ]
    self._step = 0
    self._next_M = [0] * num_islands
    self._nothing: dict[str, np.ndarray] | None = None

  def __exit__(self, *error: object) -> None:
    for each in self._iterators:
      each.close()

  def __iter__(self) -> 'IslandBatches':
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    trains_M = self._schedule.trains(self._step + 1)
    rows = {
      m: dict(next(batches))
      for m, batches in zip(self._local, self._iterators, strict=True)
      if trains_M[m]
    }
    if self._nothing is None:
      one = next(iter(rows.values()), None) or dict(self._dataset.batch_at(0))
      self._nothing = {
        name: np.zeros_like(x[: self._num_rows]) for name, x in one.items()
      }
    each = [rows.get(m, self._nothing) for m in self._local]
    self._step += 1
    self._next_M = [
      done + bool(trains)
      for done, trains in zip(self._next_M, trains_M, strict=True)
    ]
    return {name: np.stack([batch[name] for batch in each]) for name in each[0]}

  def get_state(self) -> dict[str, Any]:
    """Where every island stands, as JSON can hold it."""
    return {
      'step': self._step,
      'next_steps': list(self._next_M),
      'next_example': max(self._next_M) * self._examples(self._num_islands),
      'examples_per_step': self._examples(1),
      'fingerprint': self._dataset.fingerprint,
    }

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes on from there, also with another number of islands.

    Then all islands begin behind the last example any of them has seen, at the
    next whole step: none comes twice, those that slower islands had not yet
    reached are passed over and so many are named in the log.

    Raises:
      ValueError: If the state is of another data set or batch size.
    """
    saved = list(state.get('next_steps', ()))
    if not saved:
      raise ValueError(
        "the checkpoint's data state must be of a run with islands; use "
        'another --workdir.'
      )
    examples = int(state['examples_per_step'])
    if len(saved) != self._num_islands:
      end = max(saved) * examples * len(saved)
      step = -(-end // self._examples(self._num_islands))
      passed = step * self._examples(self._num_islands) - examples * sum(saved)
      logging.info(
        'Islands: %d, before %d; %d examples are passed over.',
        self._num_islands,
        len(saved),
        passed,
      )
      saved = [step] * self._num_islands
      examples = self._examples(1)
    for m, batches in zip(self._local, self._iterators, strict=True):
      batches.set_state(
        {
          'next_example': saved[m] * examples * self._num_islands,
          'fingerprint': state['fingerprint'],
        }
      )
    self._step = int(state['step'])
    self._next_M = [step * examples // self._examples(1) for step in saved]

  def _examples(self, num_islands: int) -> int:
    return self._dataset.config.batch_size * num_islands
