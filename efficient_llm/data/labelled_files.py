"""Reads tables of texts with labels.

Files are .csv and .tsv, whose first line names the columns (.tsv without
quotes, as GLUE has them), or .jsonl.
"""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from efficient_llm.data import corpus, staging

_EXTENSIONS = ('.csv', '.tsv', '.jsonl')


@dataclasses.dataclass(frozen=True)
class Row:
  """The texts of a row, one or two, and its label."""

  texts: tuple[str, ...]
  label: str


def read(path: str, *, texts: Sequence[str], label: str) -> list[Row]:
  """Reads all rows.

  Args:
    path: A file, or a folder or glob of files.
    texts: Names of what holds the texts.
    label: Name of what holds the label.

  Raises:
    ValueError: If one is missing or broken, with its place, in one line.
  """
  rows = []
  for file in corpus.find_files(path, extensions=_EXTENSIONS):
    for number, record in _records(file.path):
      place = f'{str(file.path)!r} line {number}'
      found = tuple(_cell(record, name, place) for name in texts)
      rows.append(Row(found, _cell(record, label, place)))
  return rows


def hashes(rows: Sequence[Row]) -> np.ndarray:
  """A hash of the texts of each row."""
  found = [staging.content_hash('\0'.join(row.texts).encode()) for row in rows]
  return np.array(found, np.uint64)


def _records(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """Yields the rows of a file, each with the number of its line."""
  number = 0
  with (
    corpus.readable(path),
    # Spreadsheets begin their files with a byte-order mark.
    path.open(encoding='utf-8-sig', newline='') as file,
  ):
    try:
      if path.suffix == '.jsonl':
        for number, line in enumerate(file, start=1):
          if line.strip():
            yield number, json.loads(line)
        return
      reader = csv.DictReader(file, strict=True)
      if path.suffix == '.tsv':
        reader = csv.DictReader(
          file, delimiter='\t', quoting=csv.QUOTE_NONE, quotechar=None
        )
      for record in reader:
        number = reader.line_num
        yield number, record
    except (
      UnicodeDecodeError,
      json.JSONDecodeError,
      RecursionError,
      csv.Error,
    ) as error:
      raise ValueError(
        f'{str(path)!r} must be a {path.suffix} file in UTF-8 and is not near '
        f'line {number}: {error}; mend it.'
      ) from error


def _cell(record: Any, name: str, place: str) -> str:
  """What a row has under a name, which may be a number in JSON."""
  if not isinstance(record, dict) or name not in record:
    found = list(record) if isinstance(record, dict) else type(record).__name__
    raise ValueError(
      f'{place} must have {name!r}, found {found}; set data.text_key, '
      'data.second_text_key and data.label_key to columns.'
    )
  value = record[name]
  if isinstance(value, int):
    value = json.dumps(value)
  # The csv module puts cells without a name under None.
  if not isinstance(value, str) or not value.strip() or None in record:
    raise ValueError(
      f'{place} must have a cell for each column, and text under {name!r}, and '
      f'has {value!r}; mend or remove the row.'
    )
  # JSON escapes may have left lone surrogates.
  return value.encode(errors='replace').decode()
