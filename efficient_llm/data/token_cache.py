"""Tokenises a corpus once and keeps the tokens on disk, memory-mapped.

An entry is a folder named after what went into it: the files with their sizes
and times, how they are read, the tokenizer. It is made in a temporary folder
and renamed when complete, so that no half-made entry is ever seen. Its contents
are hashed when written and checked when opened.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from efficient_llm.data import corpus, readers, staging, tokenizer

Log = Callable[[str], None]

_FORMAT = 1
_TOKENS = 'tokens.bin'
_DOCUMENTS = 'documents.bin'
_CONTENTS = (_TOKENS, _DOCUMENTS)
# Enough documents to keep a batch encoder busy, few enough to hold in memory.
_BYTES_ENCODED_AT_ONCE = 4 << 20
_SECS_BETWEEN_LOGS = 5.0
_DOCUMENT = np.dtype(
  [
    ('num_tokens', np.int64),
    ('num_bytes', np.int64),
    ('file', np.int64),
    ('content_hash', np.uint64),
  ]
)


@dataclasses.dataclass(frozen=True)
class TokenCache:
  """The tokens of a corpus, document after document.

  Attributes:
    tokens: All documents end to end, uint16 or uint32, memory-mapped.
    starts: First token of each document.
    lengths: Number of tokens of each document.
    num_bytes: Bytes of UTF-8 of each document.
    files: For each document the number of its file.
    content_hashes: For each document a hash of its text.
    num_invalid_utf8: Invalid sequences replaced while reading.
    fingerprint: Hash of all of the above.
  """

  tokens: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray
  num_bytes: np.ndarray
  files: np.ndarray
  content_hashes: np.ndarray
  num_invalid_utf8: int
  fingerprint: str


def open_or_build(
  files: Sequence[corpus.File],
  *,
  options: readers.ReadOptions,
  encoder: tokenizer.Tokenizer,
  cache_dir: pathlib.Path,
  log: Log,
) -> TokenCache:
  """Opens the entry for these files, making it first where it is missing.

  Args:
    files: What to tokenise, in this order.
    options: How documents are taken out of the files.
    encoder: The tokenizer.
    cache_dir: Folder of all entries; made where missing.
    log: Takes a line of progress every few seconds.

  Returns:
    The tokens, checked against the hash made when they were written.

  Raises:
    ValueError: If a file cannot be read or the entry cannot be written.
  """
  folder = cache_dir / f'tokens-{key(files, options, encoder.fingerprint)}'
  return staging.open_or_build(
    folder,
    open_entry=_open,
    build=lambda temporary: _build(temporary, files, options, encoder, log),
    log=log,
  )


def key(
  files: Sequence[corpus.File], options: readers.ReadOptions, *parts: str
) -> str:
  """Hashes which files are read, and how, without reading them."""
  listing = [
    (os.path.abspath(file.path), file.size_bytes, file.modified_ns)
    for file in files
  ]
  settings = [_FORMAT, listing, dataclasses.astuple(options), parts]
  return staging.digest([json.dumps(settings).encode()])


def _build(
  folder: pathlib.Path,
  files: Sequence[corpus.File],
  options: readers.ReadOptions,
  encoder: tokenizer.Tokenizer,
  log: Log,
) -> None:
  dtype = np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32
  progress = _Progress(sum(file.size_bytes for file in files), log)
  records: list[np.ndarray] = []
  num_invalid_utf8 = 0
  with (folder / _TOKENS).open('wb') as output:
    for documents, owners, num_invalid in _groups(files, options, progress):
      tokens, lengths = encoder.encode_documents(documents)
      output.write(tokens.astype(dtype).tobytes())
      record = np.empty(len(documents), _DOCUMENT)
      record['num_tokens'] = lengths
      record['num_bytes'] = [len(document) for document in documents]
      record['file'] = owners
      record['content_hash'] = [staging.content_hash(d) for d in documents]
      records.append(record)
      num_invalid_utf8 += num_invalid
  table = np.concatenate(records) if records else np.empty(0, _DOCUMENT)
  (folder / _DOCUMENTS).write_bytes(table.tobytes())
  summary = {
    'dtype': np.dtype(dtype).name,
    'num_invalid_utf8': num_invalid_utf8,
  }
  staging.write_summary(folder, _CONTENTS, summary)


def _groups(
  files: Sequence[corpus.File],
  options: readers.ReadOptions,
  progress: '_Progress',
) -> Iterator[tuple[list[bytes], list[int], int]]:
  """Groups documents for encoding: texts, their files, replaced sequences."""
  documents: list[bytes] = []
  owners: list[int] = []
  num_bytes = num_invalid = 0
  for number, file in enumerate(files):
    for document, invalid in readers.read_documents(file, options):
      documents.append(document)
      owners.append(number)
      num_bytes += len(document)
      num_invalid += invalid
      if num_bytes >= _BYTES_ENCODED_AT_ONCE:
        yield documents, owners, num_invalid
        progress.log_at_times(num_bytes)
        documents, owners, num_bytes, num_invalid = [], [], 0, 0
  if documents:
    yield documents, owners, num_invalid


class _Progress:
  """Says now and then how far tokenising has come."""

  def __init__(self, total_bytes: int, log: Log):
    self._total_bytes = total_bytes
    self._log = log
    self._done_bytes = 0
    self._start = self._last = time.monotonic()

  def log_at_times(self, num_bytes: int) -> None:
    self._done_bytes += num_bytes
    now = time.monotonic()
    if now - self._last < _SECS_BETWEEN_LOGS:
      return
    self._last = now
    rate = self._done_bytes / (now - self._start)
    # Compressed files hold more text than their size says.
    share = min(1.0, self._done_bytes / max(1, self._total_bytes))
    self._log(
      f'data: tokenised {self._done_bytes / 1e6:.0f} MB of text, '
      f'about {share:.0%}, {rate / 1e6:.1f} MB/s'
    )


def _open(folder: pathlib.Path) -> TokenCache | None:
  """Opens an entry; None where it is missing or not as it was written."""
  with corpus.readable(folder):
    found = staging.read_summary(folder, _CONTENTS)
    if found is None:
      return None
    summary, fingerprint = found
    table = np.fromfile(folder / _DOCUMENTS, _DOCUMENT)
    lengths = table['num_tokens']
    tokens = np.empty(0, summary['dtype'])
    # An empty file cannot be mapped.
    if lengths.sum():
      tokens = np.memmap(folder / _TOKENS, summary['dtype'], 'r')
  return TokenCache(
    tokens=tokens,
    starts=np.cumsum(lengths) - lengths,
    lengths=lengths,
    num_bytes=table['num_bytes'],
    files=table['file'],
    content_hashes=table['content_hash'],
    num_invalid_utf8=summary['num_invalid_utf8'],
    fingerprint=fingerprint,
  )
