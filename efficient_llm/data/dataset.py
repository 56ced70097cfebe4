"""What data sets of all kinds share: examples in an order, a batch at a time.

Everything here is random access: the batch of a step follows from the
configuration and the step alone, whatever the number of processes, and the
state of an iterator is a number.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import grain

from efficient_llm.data import batches, iterator, splits, stream
from efficient_llm.data.config import DataConfig


class Vocabulary(Protocol):
  """What the numbers among the targets stand for."""

  @property
  def vocab_size(self) -> int:
    """How many there are."""
    ...

  @property
  def fingerprint(self) -> str:
    """Hash of all of them."""
    ...


@dataclasses.dataclass(frozen=True)
class Examples:
  """Examples that can be read in any order, numbered through all sources.

  Attributes:
    counts: How many each source has.
    weights: Share of each source in a batch.
    read: Makes a batch of rows, each its place in the stream and the number of
      its example, `stream.PADDING` for none.
  """

  counts: Sequence[int]
  weights: Sequence[float]
  read: Callable[[Sequence[tuple[int, int]]], batches.Batch]


class Dataset(abc.ABC):
  """One split of a data set.

  Attributes:
    config: The settings it was opened with.
    fingerprint: Hash of the data and all settings that decide what the examples
      are and in which order they come.
  """

  def __init__(
    self, config: DataConfig, *, split: splits.Split, fingerprint: str
  ):
    self.config = config
    self.fingerprint = fingerprint
    self._is_validation = split == 'validation'

  @property
  @abc.abstractmethod
  def vocabulary(self) -> Vocabulary:
    """What the targets are numbers of."""

  @abc.abstractmethod
  def statistics(self) -> dict[str, int | float]:
    """Counts what the split holds."""

  @abc.abstractmethod
  def _examples(self) -> Examples:
    """What a batch is made of."""

  def _examples_of_island(
    self, island: tuple[int, int]
  ) -> tuple[Examples, tuple[int, int]]:
    """What an island has examples of, and its share of these."""
    return self._examples(), island

  @property
  def num_sequences(self) -> int:
    """Examples in one pass."""
    return sum(self._examples().counts)

  @property
  def steps_per_pass(self) -> int:
    """Batches of a single island that hold as many examples as a pass."""
    return math.ceil(self.num_sequences / self.config.batch_size)

  def iterate(
    self,
    *,
    process: tuple[int, int] = (0, 1),
    island: tuple[int, int] = (0, 1),
    repeat: bool = True,
    start: int = 0,
  ) -> iterator.BatchIterator:
    """Iterates over this process's rows of every batch.

    Training shuffles afresh each epoch. Validation takes all examples in order,
    pass after pass. The last batch of a validation pass, and of a training pass
    without `repeat`, is filled up with rows of zero weight.

    Args:
      process: Index of this process and number of processes, in its island. It
        gets a stretch of the rows of each batch, in the order of processes.
      island: Index of this island and number of islands. They see disjoint
        examples in an epoch; `config.island_sharding` says how.
      repeat: Whether to go on for ever or stop after a pass.
      start: The first step.

    Returns:
      The iterator.

    Raises:
      ValueError: If the batch does not part evenly among the processes, or the
        data not among the islands.
    """
    steps = self._steps(process=process, island=island, repeat=repeat)
    batch_iterator = iterator.BatchIterator(
      steps,
      fingerprint=self.fingerprint,
      examples_per_step=self.config.batch_size * island[1],
      prefetch_batches=self.config.prefetch_batches,
    )
    batch_iterator.seek(start)
    return batch_iterator

  def batch_at(self, step: int) -> batches.Batch:
    """Makes the whole batch of a step, for one process and one island."""
    steps = self._steps(process=(0, 1), island=(0, 1), repeat=True)
    return cast(batches.Batch, steps[step])

  def _steps(
    self, *, process: tuple[int, int], island: tuple[int, int], repeat: bool
  ) -> grain.MapDataset:
    _check_share('process', process)
    _check_share('island', island)
    batch_size = self.config.batch_size
    if batch_size % process[1]:
      raise ValueError(
        f'{batch_size=} must be divisible by the {process[1]} processes of an '
        'island; set data.batch_size.'
      )
    examples, island = self._examples_of_island(island)
    if self._is_validation:
      order = stream.in_order(examples.counts)
    else:
      seed = self.config.seed if self.config.shuffle else None
      order = stream.mixed(
        examples.counts, weights=examples.weights, seed=seed, repeat=repeat
      )
    if self._is_validation or not repeat:
      order = stream.padded(order, multiple=batch_size * island[1])
    if self._is_validation and repeat:
      order = order.repeat()
    rows = stream.Rows(order, batch_size, process=process, island=island)
    return grain.MapDataset.source(rows).batch(
      rows.rows_per_step, batch_fn=examples.read
    )


def _check_share(name: str, share: tuple[int, int]) -> None:
  index, count = share
  if not 0 <= index < count:
    raise ValueError(
      f'{name}={share} must be an index below the count; count from 0.'
    )
