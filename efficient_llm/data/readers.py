"""Reads the documents in a file of text, as UTF-8 bytes.

What a document is follows from the kind of file:

  .txt .md .py                the whole file, or what lies between separators
  .jsonl                      the text under `text_key` of each line
  .parquet                    the column `text_key` of each row
  .arrayrecord .array_record  each record, UTF-8 text
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Literal

from array_record.python import array_record_data_source
from pyarrow import parquet

from efficient_llm.data import corpus

_RECORDS_READ_AT_ONCE = 1024
_BLANK_LINES = re.compile(rb'\n[ \t\r]*\n\s*')


@dataclasses.dataclass(frozen=True)
class ReadOptions:
  """How documents are taken out of files.

  Attributes:
    text_key: Key or column that holds the text, in .jsonl and .parquet.
    document_separator: What parts the documents of a .txt or .md file: None
      for whole files, 'blank_line', or else the exact text of a line.
    invalid_utf8: Whether bytes that are not UTF-8 become U+FFFD or are refused.
  """

  text_key: str = 'text'
  document_separator: str | None = None
  invalid_utf8: Literal['replace', 'refuse'] = 'replace'


def read_documents(
  file: corpus.File, options: ReadOptions
) -> Iterator[tuple[bytes, int]]:
  """Reads the documents of one file, in order, leaving out empty ones.

  Args:
    file: A file that `find_files` listed.
    options: How documents are taken out of it.

  Yields:
    A document in valid UTF-8, and how many invalid sequences were replaced.

  Raises:
    ValueError: If the file cannot be read as its name promises; the message
      names the file and the place in it.
  """
  match file.path.suffix:
    case '.jsonl':
      documents = _read_json_lines(file.path, options)
    case '.parquet':
      documents = _read_parquet(file.path, options)
    case '.arrayrecord' | '.array_record':
      documents = _read_array_record(file.path, options)
    case _:
      documents = _read_text(file.path, options)
  with corpus.readable(file.path):
    yield from (document for document in documents if document[0])


def _read_text(
  path: pathlib.Path, options: ReadOptions
) -> Iterator[tuple[bytes, int]]:
  raw = path.read_bytes()
  _refuse_binary(raw, path, offset=0)
  text, num_invalid = _valid_utf8(raw, path, options, offset=0)
  if options.document_separator is None or path.suffix == '.py':
    yield text, num_invalid
    return
  if options.document_separator == 'blank_line':
    separator = _BLANK_LINES
  else:
    line = re.escape(options.document_separator.encode())
    separator = re.compile(rb'^' + line + rb'[ \t\r]*(?:\n|\Z)', re.MULTILINE)
  for document in separator.split(text):
    yield document, num_invalid
    num_invalid = 0


def _read_json_lines(
  path: pathlib.Path, options: ReadOptions
) -> Iterator[tuple[bytes, int]]:
  offset = 0
  with path.open('rb') as lines:
    for number, line in enumerate(lines, start=1):
      _refuse_binary(line, path, offset=offset)
      valid, num_invalid = _valid_utf8(line, path, options, offset=offset)
      offset += len(line)
      if not valid.strip():
        continue
      place = f'{str(path)!r} line {number}'
      text = _text_of_json(valid, options.text_key, place)
      document, num_surrogates = _encode(text, options, place)
      yield document, num_invalid + num_surrogates


def _text_of_json(line: bytes, text_key: str, place: str) -> str:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{place} must be a JSON object: {error}; mend or remove the line.'
    ) from error
  text = record.get(text_key) if isinstance(record, dict) else None
  if not isinstance(text, str):
    found = (
      sorted(record) if isinstance(record, dict) else type(record).__name__
    )
    raise ValueError(
      f'{place} must have text under {text_key=}, found {found}; '
      'set data.text_key or mend the line.'
    )
  return text


def _encode(text: str, options: ReadOptions, place: str) -> tuple[bytes, int]:
  """Encodes text, in which JSON escapes may have left lone surrogates."""
  try:
    return text.encode(), 0
  except UnicodeEncodeError as error:
    if options.invalid_utf8 == 'refuse':
      raise ValueError(
        f'{place} must be valid Unicode, found a lone surrogate at character '
        f"{error.start}; mend it or set data.invalid_utf8='replace'."
      ) from error
  repaired = re.sub('[\ud800-\udfff]', '\ufffd', text)
  return repaired.encode(), repaired.count('\ufffd') - text.count('\ufffd')


def _read_parquet(
  path: pathlib.Path, options: ReadOptions
) -> Iterator[tuple[bytes, int]]:
  key = options.text_key
  with parquet.ParquetFile(path) as table:
    columns = table.schema_arrow.names
    if key not in columns:
      raise ValueError(
        f'{str(path)!r} must have a column text_key={key!r}, found {columns}; '
        'set data.text_key.'
      )
    row = 0
    for batch in table.iter_batches(_RECORDS_READ_AT_ONCE, columns=[key]):
      for value in batch.column(0).to_pylist():
        place = f'{str(path)!r} row {row}'
        row += 1
        if isinstance(value, str):
          value = value.encode()
        if not isinstance(value, bytes):
          raise ValueError(
            f'{place} must have text under text_key={key!r}, found {value!r}; '
            'set data.text_key or mend the row.'
          )
        yield _valid_utf8(value, path, options, offset=0, place=place)


def _read_array_record(
  path: pathlib.Path, options: ReadOptions
) -> Iterator[tuple[bytes, int]]:
  with array_record_data_source.ArrayRecordDataSource(str(path)) as records:
    for first in range(0, len(records), _RECORDS_READ_AT_ONCE):
      end = min(first + _RECORDS_READ_AT_ONCE, len(records))
      numbers = range(first, end)
      read = records.__getitems__(numbers)
      for number, record in zip(numbers, read, strict=True):
        place = f'{str(path)!r} record {number}'
        yield _valid_utf8(record, path, options, offset=0, place=place)


def _refuse_binary(raw: bytes, path: pathlib.Path, *, offset: int) -> None:
  position = raw.find(b'\0')
  if position >= 0:
    raise ValueError(
      f'{str(path)!r} must be text, found a NUL at byte {offset + position}; '
      'leave out the file.'
    )


def _valid_utf8(
  raw: bytes,
  path: pathlib.Path,
  options: ReadOptions,
  *,
  offset: int,
  place: str | None = None,
) -> tuple[bytes, int]:
  """Returns the bytes in valid UTF-8 and how many sequences were replaced."""
  try:
    raw.decode()
    return raw, 0
  except UnicodeDecodeError as error:
    if options.invalid_utf8 == 'refuse':
      raise ValueError(
        f'{place or repr(str(path))} must be UTF-8, found an invalid byte at '
        f"{offset + error.start}; mend it or set data.invalid_utf8='replace'."
      ) from error
  repaired = raw.decode(errors='replace').encode()
  replacement = '\ufffd'.encode()
  return repaired, repaired.count(replacement) - raw.count(replacement)
