"""How another process tells that it has ended, and what it says until then."""

import contextlib
import json
import os
import pathlib
from typing import Any

_ENDING, _PROCESS = 'ending.json', 'process.txt'


def read(launch: pathlib.Path) -> dict[str, Any] | None:
  """How it ended; None if it has not."""
  with contextlib.suppress(FileNotFoundError):
    return json.loads((launch / _ENDING).read_bytes())
  return None


def is_dead(launch: pathlib.Path) -> bool:
  """Whether it began and is no more, without having ended."""
  try:
    process = int((launch / _PROCESS).read_text())
    os.kill(process, 0)
  except FileNotFoundError:
    return False
  except ProcessLookupError:
    return read(launch) is None
  return False


class Tail:
  """The lines that are added to a file.

  Args:
    path: Of the file, which need not be there yet.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._place = path.stat().st_size if path.exists() else 0

  def new(self) -> list[str]:
    """Whole lines since the last time."""
    if not self._path.exists():
      return []
    with self._path.open('rb') as file:
      file.seek(self._place)
      text = file.read()
    whole = text[: text.rfind(b'\n') + 1]
    self._place += len(whole)
    return whole.decode('utf-8', errors='replace').splitlines()
