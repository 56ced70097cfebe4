"""Batches one after another, ahead of their use, from any step on."""

from collections.abc import Iterator, Mapping
from typing import Any

import grain

from efficient_llm.data import batches

# One thread keeps well ahead of a training step and leaves the other cores.
_NUM_READ_THREADS = 1


class BatchIterator(Iterator[batches.Batch]):
  """Iterates over batches; its state is how many were handed out.

  The state counts examples over all processes and islands. It may be set on any
  number of them and at any batch size, as long as a step begins there.
  """

  def __init__(
    self,
    steps: grain.MapDataset,
    *,
    fingerprint: str,
    examples_per_step: int,
    prefetch_batches: int,
  ):
    self._num_steps = len(steps)
    self._fingerprint = fingerprint
    self._examples_per_step = examples_per_step
    options = grain.ReadOptions(
      num_threads=_NUM_READ_THREADS, prefetch_buffer_size=prefetch_batches
    )
    self._iterator = iter(steps.to_iter_dataset(options))
    self._next_step = 0

  def __next__(self) -> batches.Batch:
    batch = next(self._iterator)
    self._next_step += 1
    return batch

  def get_state(self) -> dict[str, Any]:
    """Returns where the batch after the last one handed out is, for JSON."""
    return {
      'next_step': self._next_step,
      'next_example': self._next_step * self._examples_per_step,
      'fingerprint': self._fingerprint,
    }

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues where an iterator over the same data set was.

    Args:
      state: What its `get_state` returned.

    Raises:
      ValueError: If it is of another data set, or no step begins there.
    """
    example = state.get('next_example')
    if not isinstance(example, int) or 'fingerprint' not in state:
      raise ValueError(
        f"an iterator's state must have next_example and fingerprint, found "
        f'{dict(state)}; restore another checkpoint.'
      )
    if state['fingerprint'] != self._fingerprint:
      raise ValueError(
        f'the state is of data set {state["fingerprint"]}, this one is '
        f'{self._fingerprint}: the text or a setting in data.* has changed; '
        'put it back or start in a new workdir.'
      )
    step, rest = divmod(example, self._examples_per_step)
    if rest:
      raise ValueError(
        f'next_example={example} must be a multiple of the '
        f'{self._examples_per_step} examples of a step; set data.batch_size.'
      )
    self.seek(step)

  def seek(self, step: int) -> None:
    """Makes `step` the next one.

    Args:
      step: Number of a step.

    Raises:
      ValueError: If there is no such step.
    """
    if not 0 <= step <= self._num_steps:
      raise ValueError(
        f'{step=} must be in [0, {self._num_steps}], the steps of this data '
        'set; start at another step.'
      )
    self._iterator.set_state({'next_index': step})
    self._next_step = step

  def close(self) -> None:
    """Stops reading ahead."""
    self._iterator.close()
