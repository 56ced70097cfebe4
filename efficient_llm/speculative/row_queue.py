"""Rows that wait for a place in a batch; several engines may take from one."""

import collections
import threading
from collections.abc import Iterable


class RowQueue:
  """A queue for threads: whoever has room takes the next rows."""

  def __init__(self, rows: Iterable[int]) -> None:
    self._rows = collections.deque(rows)
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._rows)

  def take(self, count: int) -> list[int]:
    """Takes up to so many rows, in order."""
    with self._lock:
      return [self._rows.popleft() for _ in range(min(count, len(self._rows)))]
