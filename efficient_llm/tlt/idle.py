"""Whether a step of training still fits into a worker's idle time."""

import collections
import statistics

_NUM_KEPT = 64
# Fewer periods tell nothing, and nothing is refused then.
_FEW = 8


class IdlePeriods:
  """How long a worker was without answers, time and again."""

  def __init__(self) -> None:
    self._secs: collections.deque[float] = collections.deque(maxlen=_NUM_KEPT)

  def add(self, secs: float) -> None:
    """Remembers a period that has ended."""
    self._secs.append(secs)

  def has_room(self, elapsed_secs: float, needed_secs: float) -> bool:
    """Whether a period goes on for long enough more often than not.

    Judged by the earlier ones that lasted as long already; one that is longer
    than all of them is taken to go on.

    Args:
      elapsed_secs: Of the period so far.
      needed_secs: What is to be begun takes so long.
    """
    rests = [x - elapsed_secs for x in self._secs if x > elapsed_secs]
    if len(self._secs) < _FEW or not rests:
      return True
    return statistics.median(rests) >= needed_secs
