"""Folders that appear whole or not at all, and are checked when opened."""

import contextlib
import hashlib
import itertools
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

_Entry = TypeVar('_Entry')
_BYTES_READ_AT_ONCE = 4 << 20
_SUMMARY = 'summary.json'


def open_or_build(
  folder: pathlib.Path,
  *,
  open_entry: Callable[[pathlib.Path], _Entry | None],
  build: Callable[[pathlib.Path], None],
  log: Callable[[str], None],
) -> _Entry:
  """Opens an entry of the data cache, making it first where it is missing.

  Args:
    folder: Of the entry; its name says what went into it.
    open_entry: Opens the folder; None where it is missing or not as it was
      written.
    build: Writes the contents into an empty folder.
    log: Takes a line where a damaged entry is replaced.

  Raises:
    ValueError: If the entry cannot be written or does not read back.
  """
  entry = open_entry(folder)
  if entry is None:
    with staged(folder) as temporary:
      build(temporary)
      # Another run may have put its own there meanwhile, and be reading it.
      if folder.exists() and open_entry(folder) is None:
        log(f'data: {str(folder)!r} is damaged and is replaced')
        shutil.rmtree(folder)
    entry = open_entry(folder)
  if entry is None:
    raise ValueError(
      f'the data cache {str(folder)!r} must read back as it was written and '
      'does not; check the disk or set data.cache_dir.'
    )
  return entry


def digest(chunks: Iterable[bytes]) -> str:
  """Hash of bytes, one part after another."""
  found = hashlib.blake2b(digest_size=16)
  for chunk in chunks:
    found.update(chunk)
  return found.hexdigest()


def content_hash(content: bytes) -> int:
  """Hash of a document or an image, of 64 bits."""
  found = hashlib.blake2b(content, digest_size=8).digest()
  return int.from_bytes(found, 'little')


def write_summary(
  folder: pathlib.Path, names: Sequence[str], summary: Mapping[str, Any]
) -> None:
  """Writes what is said of an entry, with a hash of that and of its files.

  Args:
    folder: Of the entry.
    names: Its other files, which are written already.
    summary: As JSON can hold it.
  """
  written = {**summary, 'hash': _digest_of(folder, names, summary)}
  (folder / _SUMMARY).write_text(json.dumps(written, indent=2))


def read_summary(
  folder: pathlib.Path, names: Sequence[str]
) -> tuple[dict[str, Any], str] | None:
  """What is said of an entry, and the hash.

  Args:
    folder: Of the entry.
    names: As for `write_summary`.
  Returns:
    None where the entry is missing or not as it was written.
  """
  try:
    summary = json.loads((folder / _SUMMARY).read_text())
    fingerprint = summary.pop('hash')
    if fingerprint != _digest_of(folder, names, summary):
      return None
  except (FileNotFoundError, ValueError, AttributeError, KeyError):
    return None
  return summary, fingerprint


def _digest_of(
  folder: pathlib.Path, names: Sequence[str], summary: Mapping[str, Any]
) -> str:
  settings = json.dumps(summary, sort_keys=True).encode()
  contents = (chunk for name in names for chunk in _chunks(folder / name))
  return digest(itertools.chain([settings], contents))


def _chunks(path: pathlib.Path) -> Iterator[bytes]:
  with path.open('rb') as file:
    while chunk := file.read(_BYTES_READ_AT_ONCE):
      yield chunk


@contextlib.contextmanager
def staged(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary folder that becomes `folder`, whole or not at all.

  Args:
    folder: The place the contents end up in. Where another process puts its
      own there meanwhile, that one stays.

  Yields:
    An empty folder on the same disk.

  Raises:
    ValueError: If the disk is full or may not be written to.
  """
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      prefix='building-', dir=folder.parent
    ) as temporary:
      contents = pathlib.Path(temporary, 'contents')
      contents.mkdir()
      yield contents
      try:
        contents.rename(folder)
      except OSError:
        # Another process was first, and its contents are the same.
        if not folder.is_dir():
          raise
  except OSError as error:
    raise ValueError(
      f'the data cache must be writable and fit on the disk: writing '
      f'{str(folder.parent)!r} failed ({error.strerror}); free some space or '
      'set data.cache_dir.'
    ) from error
