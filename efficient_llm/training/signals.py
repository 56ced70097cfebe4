"""Asking a training run to stop: SIGTERM, Ctrl-C, or a cluster's notice."""

import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class StopRequest:
  """Turns the first SIGTERM or Ctrl-C into a question the loop asks.

  With several processes JAX's preemption service, which `jax.distributed`
  starts, sees to it that all of them stop after the same step, whichever of
  them got the signal. A second signal has its usual effect.
  """

  def __init__(self) -> None:
    self.signal_name: str | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is not threading.main_thread():
      return self
    wanted = [signal.SIGINT]
    # With several processes SIGTERM belongs to the preemption service.
    if jax.process_count() == 1:
      wanted.append(signal.SIGTERM)
    for number in wanted:
      previous = signal.signal(number, self._remember)
      # None stands for a handler that Python did not install.
      self._previous[number] = previous or signal.SIG_DFL
    return self

  def __exit__(self, *exc_info: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _remember(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.signal_name = signal.Signals(number).name
    signal.signal(number, self._previous[number])
    if jax.process_count() > 1:
      # The preemption service tells the other processes.
      signal.raise_signal(signal.SIGTERM)

  def is_set(self, step: int) -> bool:
    """Whether to stop after this step; all processes get the same answer."""
    if jax.process_count() == 1:
      return self.signal_name is not None
    if not multihost_utils.reached_preemption_sync_point(step):
      return False
    self.signal_name = self.signal_name or 'SIGTERM'
    return True
