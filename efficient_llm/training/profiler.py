"""A trace of some steps, by jax.profiler."""

import pathlib
from typing import Any, Self

import jax
from absl import logging


def parse_range(text: str | None) -> tuple[int, int] | None:
  """First and last profiled step, from 'first:last'.

  Raises:
    ValueError: If the text is no such range.
  """
  if text is None:
    return None
  first, _, last = text.partition(':')
  if not (
    first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)
  ):
    raise ValueError(
      f'profile_steps={text!r} must be the first and the last step, counted '
      'from 1; for example 10:13.'
    )
  return int(first), int(last)


class Profiler:
  """Traces a range of steps, both ends included.

  Args:
    steps: The range; None for no trace.
    folder: Where the trace is written.
  """

  def __init__(
    self, steps: tuple[int, int] | None, folder: pathlib.Path
  ) -> None:
    self._steps = steps
    self._folder = folder
    self._is_on = False

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._stop()

  def before(self, step: int, state: Any) -> None:
    """Called before every step, with the state that it will change."""
    if self._steps is None:
      return
    first, last = self._steps
    if self._is_on and step > last:
      # Steps run on behind this loop; they belong into the trace.
      jax.block_until_ready(state)
      self._stop()
    elif not self._is_on and step == first:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._folder))
      self._is_on = True

  def _stop(self) -> None:
    if self._is_on:
      jax.profiler.stop_trace()
      self._is_on = False
      logging.info('Wrote a profile to %s.', self._folder)
