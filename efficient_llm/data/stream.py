"""The order in which sequences come: grain datasets with random access.

A stream is a dataset of the numbers of sequences, which count through all
sources. Islands take its elements in turn; in an island, a step takes the next
`batch_size` of them, and each process of it an equal stretch of those.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

# Stands for a row that holds nothing.
PADDING = -1
# Endless, and still exact where grain divides lengths in floating point.
_MOST_STEPS = 1 << 32


def mixed(
  counts: Sequence[int],
  *,
  weights: Sequence[float],
  seed: int | None,
  repeat: bool,
) -> grain.MapDataset:
  """Mixes sources by weight; each comes in a new order every epoch.

  Args:
    counts: Number of sequences of each source.
    weights: Share of each source.
    seed: Of the orders; None for the order of the text.
    repeat: Whether it goes on for ever, or ends when a source is used up.

  Returns:
    A stream.
  """
  sources = []
  for number, source in enumerate(_sources(counts)):
    if seed is not None:
      mixed_seed = np.random.SeedSequence([seed, number]).generate_state(1)
      source = source.shuffle(int(mixed_seed[0]))
    sources.append(source.repeat() if repeat else source)
  if len(sources) == 1:
    return sources[0]
  return grain.MapDataset.mix(sources, list(weights))


def in_order(counts: Sequence[int]) -> grain.MapDataset:
  """Goes once through all sources, one after another."""
  return grain.MapDataset.concatenate(_sources(counts))


def padded(stream: grain.MapDataset, *, multiple: int) -> grain.MapDataset:
  """Adds empty rows, so that the last batch is a whole one."""
  missing = -len(stream) % multiple
  if not missing:
    return stream
  empty = grain.MapDataset.source([PADDING] * missing)
  return grain.MapDataset.concatenate([stream, empty])


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of one process of one island, a source for grain.

  A row is its place in the stream and its sequence, so that what is drawn at
  random for a row can depend on the place alone.

  Attributes:
    stream: The order of sequences.
    batch_size: Rows of a step in one island.
    process: Index of the process and number of processes, in the island.
    island: Index of the island and number of islands.
  """

  stream: grain.MapDataset
  batch_size: int
  process: tuple[int, int]
  island: tuple[int, int]

  @property
  def rows_per_step(self) -> int:
    """Rows of a step in this process."""
    return self.batch_size // self.process[1]

  def __len__(self) -> int:
    num_steps = len(self.stream) // (self.batch_size * self.island[1])
    return min(num_steps, _MOST_STEPS) * self.rows_per_step

  def __getitem__(self, index: int) -> tuple[int, Any]:
    step, row = divmod(index, self.rows_per_step)
    row += self.process[0] * self.rows_per_step
    place = (step * self.batch_size + row) * self.island[1] + self.island[0]
    return place, self.stream[place]


def _sources(counts: Sequence[int]) -> list[grain.MapDataset]:
  bounds = itertools.pairwise(itertools.accumulate(counts, initial=0))
  return [grain.MapDataset.source(range(*bound)) for bound in bounds]
