"""Metrics of train steps: fetched late, averaged from one line to the next."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from efficient_llm import typing

# The device always has this many steps queued; more would only hide failures.
_STEPS_IN_FLIGHT = 2


@dataclasses.dataclass
class _Window:
  """The steps since the last line.

  Attributes:
    num_steps: All of them.
    num_skipped: Those whose loss or gradient was not finite.
    num_timed: Those that `secs` covers.
    secs: Training time.
    sums: Metrics summed over the steps that were not skipped.
    counts: Steps in each sum, as not every step need have every metric.
    learning_rate: Of the last step.
  """

  num_steps: int = 0
  num_skipped: int = 0
  num_timed: int = 0
  secs: float = 0.0
  sums: dict[str, float] = dataclasses.field(default_factory=dict)
  counts: dict[str, int] = dataclasses.field(default_factory=dict)
  learning_rate: float = 0.0


class StepMetrics:
  """Totals of a run, and averages over the steps since the last line.

  A checkpoint takes both along, so that a resumed run writes the lines of one
  that was never interrupted.

  Args:
    check: Called for every step with its number and metrics, in order; raises
      where the run must not go on.
    read: Makes the metrics of what was fetched; see `Task.read`.

  Attributes:
    num_tokens: Target tokens trained on; skipped steps do not count.
    train_secs: Seconds spent in steps since `start_clock`, pauses left out.
  """

  def __init__(
    self,
    check: Callable[[int, Mapping[str, Any]], None],
    read: Callable[[Any], Mapping[str, Any]] = lambda values: values,
  ) -> None:
    self._check, self._read = check, read
    self._queue: collections.deque[tuple[int, typing.Metrics]] = (
      collections.deque()
    )
    self._num_untimed = 0
    self._clock: float | None = None
    self._window = _Window()
    self.num_tokens = 0.0
    self.train_secs = 0.0

  def start_clock(self) -> None:
    """Begins to count time; steps before this have none."""
    if self._clock is None:
      self._clock = time.monotonic()

  def push(self, step: int, values: typing.Metrics) -> None:
    """Queues a step's metrics and waits while too many steps are queued."""
    self._num_untimed += self._clock is None
    self._queue.append((step, values))
    if len(self._queue) > _STEPS_IN_FLIGHT:
      jax.block_until_ready(self._queue[-1 - _STEPS_IN_FLIGHT][1])

  def fetch(self) -> None:
    """Takes the queued metrics from the device and checks them."""
    steps = [step for step, _ in self._queue]
    fetched = jax.device_get([values for _, values in self._queue])
    self._queue.clear()
    self._tick()
    for step, raw in zip(steps, fetched, strict=True):
      values = self._read(raw)
      self._check(step, values)
      self._add(values)
    self._window.num_timed += len(steps) - self._num_untimed
    self._num_untimed = 0

  def line(self) -> dict[str, float]:
    """Averages of the window, which begins anew; `fetch` comes first."""
    window, self._window = self._window, _Window()
    means = {
      name: total / window.counts[name] for name, total in window.sums.items()
    }
    line = {
      **(means or {'loss': float('nan')}),
      'learning_rate': window.learning_rate,
      'tokens': self.num_tokens,
      'skipped': window.num_skipped,
    }
    if window.num_timed:
      # A technique may know better which of the seconds count.
      line.setdefault('step_secs', window.secs / window.num_timed)
    return line

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Leaves the time inside the block out of the steps' time."""
    if self._queue:
      jax.block_until_ready(self._queue[-1][1])
    self._tick()
    yield
    if self._clock is not None:
      self._clock = time.monotonic()

  def get_state(self) -> dict[str, Any]:
    """The totals and the window, as JSON can hold them."""
    window = dataclasses.asdict(self._window)
    # As text, which is exact and takes what is not finite.
    window['sums'] = {name: repr(x) for name, x in window['sums'].items()}
    return {
      'num_tokens': self.num_tokens,
      'train_secs': self.train_secs,
      'window': window,
    }

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes on from there."""
    self.num_tokens = state['num_tokens']
    self.train_secs = state['train_secs']
    window = state['window']
    sums = {name: float(text) for name, text in window['sums'].items()}
    # A checkpoint of an earlier release has one count for all.
    counted = window['num_steps'] - window['num_skipped']
    counts = window.get('counts', dict.fromkeys(sums, counted))
    self._window = _Window(**{**window, 'sums': sums, 'counts': counts})

  def _add(self, values: Mapping[str, Any]) -> None:
    window = self._window
    window.num_steps += 1
    window.learning_rate = float(values.get('learning_rate', 0.0))
    if not values['finite']:
      window.num_skipped += 1
      return
    self.num_tokens += float(values['tokens'])
    for name, value in values.items():
      if name not in ('finite', 'tokens', 'learning_rate'):
        window.sums[name] = window.sums.get(name, 0.0) + float(value)
        window.counts[name] = window.counts.get(name, 0) + 1

  def _tick(self) -> None:
    if self._clock is None:
      return
    now = time.monotonic()
    self._window.secs += now - self._clock
    self.train_secs += now - self._clock
    self._clock = now
