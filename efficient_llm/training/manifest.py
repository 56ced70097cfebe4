"""The file of hashes that tells a whole checkpoint from a damaged one.

Orbax publishes a folder atomically but stores arrays without a checksum, so a
flipped bit comes back as a wrong number. The manifest lists every file of the
folder with its size and SHA-256, and the leaves saved in it. It is written
last and has one valid spelling, which ends with the hash of the rest, so a
change of any byte of it shows too. It guards against accidents, not against
somebody who may write to the folder.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from concurrent import futures
from typing import Any

FILE_NAME = 'MANIFEST.json'
MAX_BYTES = 64 * 2**20
MAX_NAME_CHARS = 1024
_FORMAT = 1
# Hashing leaves Python's lock, so a few threads keep a fast disk busy.
_NUM_THREADS = 4


@dataclasses.dataclass(frozen=True)
class FileEntry:
  """What one file must be."""

  num_bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of the saved tree; `path` joins its keys with slashes."""

  path: str
  shape: tuple[int, ...]
  dtype: str


@dataclasses.dataclass(frozen=True)
class Manifest:
  """All that a step's folder holds."""

  step: int
  files: Mapping[str, FileEntry]
  leaves: tuple[Leaf, ...]


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing that is wrong with one file of one step."""

  step: int
  file: str
  problem: str

  def __str__(self) -> str:
    return f'step {self.step}: {self.file} {self.problem}'


def write(
  folder: pathlib.Path, *, step: int, leaves: Iterable[Leaf]
) -> Manifest:
  """Hashes every file of a finished folder, then publishes the manifest.

  Files, folders and manifest are flushed to the disk in that order, so after
  a power cut a manifest never describes bytes that were not kept.

  Args:
    folder: The step's folder; nothing may write to it any more.
    step: The step it belongs to.
    leaves: The arrays that were saved.

  Returns:
    The manifest as written.

  Raises:
    OSError: If a file cannot be read or written.
    ValueError: If a file cannot be listed, such as a symbolic link.
  """

  def entry(name: str) -> FileEntry:
    path = folder / name
    if not _is_plain_file(path):
      raise ValueError(f'{path} must be a plain file; remove it.')
    flush(path)
    return FileEntry(path.stat().st_size, _sha256(path))

  names = [_checked_name(name) for name in _files(folder)]
  with futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    files = dict(zip(names, pool.map(entry, names), strict=True))
  for path in folder.rglob('*'):
    if path.is_dir():
      flush(path)
  manifest = Manifest(step=step, files=files, leaves=tuple(leaves))
  write_atomically(folder / FILE_NAME, encode(manifest))
  return manifest


def read(folder: pathlib.Path) -> Manifest:
  """Reads a folder's manifest and checks it against its own hash.

  Raises:
    OSError: If it is missing or cannot be read.
    ValueError: If it is damaged.
  """
  path = folder / FILE_NAME
  if path.is_symlink() or path.is_dir():
    raise ValueError('is not a plain file')
  with path.open('rb') as file:
    return decode(file.read(MAX_BYTES + 1))


def verify(folder: pathlib.Path, *, step: int) -> list[Finding]:
  """Compares a step's folder with its manifest, byte for byte.

  Returns:
    What is wrong: missing, added, resized and changed files. Empty when whole.
  """
  try:
    manifest = read(folder)
  except FileNotFoundError:
    return [Finding(step, FILE_NAME, 'is missing')]
  except (OSError, ValueError) as error:
    return [Finding(step, FILE_NAME, str(error))]
  if manifest.step != step:
    return [Finding(step, FILE_NAME, f'belongs to step {manifest.step}')]

  def problem(name: str) -> str | None:
    path, entry = folder / name, manifest.files[name]
    try:
      if not _is_plain_file(path):
        return 'is missing' if not path.exists() else 'is not a plain file'
      if (num_bytes := path.stat().st_size) != entry.num_bytes:
        return f'has {num_bytes} bytes instead of {entry.num_bytes}'
      return None if _sha256(path) == entry.sha256 else 'has changed contents'
    except OSError as error:
      return f'cannot be read: {error}'

  with futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    problems = zip(
      manifest.files, pool.map(problem, manifest.files), strict=True
    )
    findings = [Finding(step, name, text) for name, text in problems if text]
  extra = sorted(set(_files(folder)) - set(manifest.files))
  # Quoted by ascii(): such a name may hold anything.
  return findings + [
    Finding(step, ascii(name), 'is not in the manifest') for name in extra
  ]


def encode(manifest: Manifest) -> bytes:
  """The one valid spelling of a manifest."""
  document: dict[str, Any] = {
    'files': {
      name: {'bytes': entry.num_bytes, 'sha256': entry.sha256}
      for name, entry in manifest.files.items()
    },
    'format': _FORMAT,
    'leaves': [
      {'dtype': leaf.dtype, 'path': leaf.path, 'shape': list(leaf.shape)}
      for leaf in manifest.leaves
    ],
    'step': manifest.step,
  }
  digest = hashlib.sha256(_spell(document)).hexdigest()
  return _spell({**document, 'sha256': digest})


def decode(data: bytes) -> Manifest:
  """Reads what `encode` wrote and refuses everything else.

  Raises:
    ValueError: If `data` is not, to the byte, the spelling of a manifest.
  """
  if len(data) > MAX_BYTES:
    raise ValueError(f'is larger than {MAX_BYTES} bytes')
  try:
    document = json.loads(data.decode('ascii'))
    manifest = Manifest(
      step=int(document['step']),
      files={
        _checked_name(name): FileEntry(int(e['bytes']), str(e['sha256']))
        for name, e in document['files'].items()
      },
      leaves=tuple(
        Leaf(str(e['path']), tuple(map(int, e['shape'])), str(e['dtype']))
        for e in document['leaves']
      ),
    )
  except (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
  ) as error:
    raise ValueError('is not a readable manifest') from error
  # Spelling it again checks types, order, white space and hash at once.
  if encode(manifest) != data:
    raise ValueError('does not match its own hash')
  return manifest


def write_atomically(path: pathlib.Path, data: bytes) -> None:
  """Writes a file so that it is seen whole or not at all."""
  partial = path.with_name(f'{path.name}.partial')
  with partial.open('wb') as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  partial.replace(path)
  flush(path.parent)


def flush(path: pathlib.Path) -> None:
  """Asks the system to put a file's bytes, or a folder's names, on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _spell(document: dict[str, Any]) -> bytes:
  return json.dumps(document, indent=1, sort_keys=True).encode('ascii') + b'\n'


def _files(folder: pathlib.Path) -> list[str]:
  """Everything below the folder but plain folders and the manifest itself."""
  names = (
    path.relative_to(folder).as_posix()
    for path in folder.rglob('*')
    if path.is_symlink() or not path.is_dir()
  )
  return sorted(name for name in names if name != FILE_NAME)


def _checked_name(name: str) -> str:
  """Refuses a name that could point outside the folder."""
  parts = name.split('/')
  if (
    len(name) > MAX_NAME_CHARS
    or name == FILE_NAME
    or not all(name.isprintable() and part for part in parts)
    or {'.', '..'} & set(parts)
    or '\\' in name
  ):
    raise ValueError(f'{name[:80]!a} must be a plain relative file name.')
  return name


def _is_plain_file(path: pathlib.Path) -> bool:
  return path.is_file() and not path.is_symlink()


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
