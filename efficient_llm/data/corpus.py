"""Finds the files of a corpus.

A path is 'stdlib', a file, a folder (searched recursively) or a glob. Files
come in the order of their names, so that every machine that holds the same
files sees the same text in the same order.
"""

import contextlib
import dataclasses
import glob
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterator, Sequence

import pyarrow as pa

STDLIB = 'stdlib'
EXTENSIONS = (
  '.txt',
  '.md',
  '.py',
  '.jsonl',
  '.parquet',
  '.arrayrecord',
  '.array_record',
)
# Tests and tools: large, repetitive, and not installed everywhere.
_STDLIB_FOLDERS_LEFT_OUT = (
  'test',
  'tests',
  'idlelib',
  'lib2to3',
  'site-packages',
  'dist-packages',
  '__pycache__',
)


@dataclasses.dataclass(frozen=True)
class File:
  """One file of a corpus; `name` is its path below the folder searched."""

  path: pathlib.Path
  name: str
  size_bytes: int
  modified_ns: int


def find_files(
  path: str, *, extensions: Sequence[str] = EXTENSIONS
) -> list[File]:
  """Lists the files that a path stands for, sorted by name.

  Args:
    path: 'stdlib' for the sources of the running Python's standard library, a
      file, a folder, or a glob (`**` matches folders too).
    extensions: Of the files that are wanted.

  Returns:
    At least one file.

  Raises:
    ValueError: If nothing is there, or nothing of a known kind.
  """
  expanded = os.path.expanduser(path)
  if path == STDLIB:
    root = sysconfig.get_path('stdlib')
    found = _walk(root, leave_out=_STDLIB_FOLDERS_LEFT_OUT)
    paths = [p for p in found if p.suffix == '.py']
  elif os.path.isdir(expanded):
    root = expanded
    paths = list(_walk(root))
  elif os.path.exists(expanded):
    root = os.path.dirname(expanded)
    paths = [pathlib.Path(expanded)]
  elif glob.has_magic(expanded):
    # What comes before the first wildcard is common to all matches.
    root = os.path.dirname(re.split(r'[*?[]', expanded)[0])
    matches = map(pathlib.Path, glob.glob(expanded, recursive=True))
    paths = [p for p in matches if p.is_file()]
  else:
    raise ValueError(f'{path!r} must exist; set data.path to a file or folder.')
  paths = [p for p in paths if p.suffix in extensions]
  if not paths:
    raise ValueError(
      f'{path!r} must hold files ending in one of {" ".join(extensions)}; '
      'none found, so set data.path to such files.'
    )
  files = [_describe(p, pathlib.Path(root)) for p in paths]
  return sorted(files, key=lambda file: file.name)


@contextlib.contextmanager
def readable(path: pathlib.Path) -> Iterator[None]:
  """Turns what reading a file may raise into one line that names it."""
  try:
    yield
  except (OSError, RuntimeError, pa.ArrowException) as error:
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise ValueError(
      f'{str(path)!r} must be readable: {reason}; mend or leave out the file.'
    ) from error


def _walk(
  root: str, *, leave_out: Sequence[str] = ()
) -> Iterator[pathlib.Path]:
  """Yields the files of a folder and its subfolders, but no hidden ones."""
  with readable(pathlib.Path(root)):
    for folder, subfolders, names in os.walk(root, onerror=_raise):
      subfolders[:] = [
        name
        for name in subfolders
        if name not in leave_out and not name.startswith('.')
      ]
      yield from (
        pathlib.Path(folder, name) for name in names if not name.startswith('.')
      )


def _raise(error: OSError) -> None:
  raise error


def _describe(path: pathlib.Path, root: pathlib.Path) -> File:
  with readable(path):
    status = path.stat()
  return File(
    path=path,
    name=path.relative_to(root).as_posix(),
    size_bytes=status.st_size,
    modified_ns=status.st_mtime_ns,
  )
