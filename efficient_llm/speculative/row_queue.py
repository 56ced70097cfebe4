"""Rows that wait for a place in a batch; several engines may take from one."""

import collections
import threading
from collections.abc import Iterable


class RowQueue:
  """A queue for threads: whoever has room takes the next rows.

  Attributes:
    is_closed: Whether engines are to stop between two stretches of rounds,
      whatever they have begun.
  """

  def __init__(self, rows: Iterable[int]) -> None:
    self._rows = collections.deque(rows)
    self._lock = threading.Lock()
    self.is_closed = False

  def close(self) -> None:
    """Drops the rows that wait; what was begun is left unfinished."""
    with self._lock:
      self.is_closed = True
      self._rows.clear()

  def __len__(self) -> int:
    return len(self._rows)

  def rows(self) -> list[int]:
    """Those that wait at this moment, in order."""
    with self._lock:
      return list(self._rows)

  def take(self, count: int) -> list[int]:
    """Takes up to so many rows, in order."""
    with self._lock:
      return [self._rows.popleft() for _ in range(min(count, len(self._rows)))]
