"""Every kind of file gives its documents, or one line about what is wrong."""

import importlib
import json

import hypothesis
import pyarrow as pa
import pytest
from hypothesis import strategies as st
from pyarrow import parquet

from efficient_llm.data import corpus, readers

_TEXTS = st.lists(
  st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0')),
  max_size=5,
)
_DOCUMENTS = ['first\ndocument', 'zweites, größer', '三']


def _read(path, **options):
  [file] = corpus.find_files(str(path))
  found = list(readers.read_documents(file, readers.ReadOptions(**options)))
  texts = [document.decode() for document, _ in found]
  return texts, sum(num_invalid for _, num_invalid in found)


def _refusal(path, **options):
  with pytest.raises(ValueError) as refusal:
    _read(path, **options)
  message = str(refusal.value)
  assert str(path) in message
  assert '\n' not in message
  return message


@pytest.mark.parametrize('suffix', ['.txt', '.md', '.py'])
def test_a_text_file_is_one_document(tmp_path, suffix):
  path = tmp_path / f'a{suffix}'
  path.write_text('one\n\ntwo\n')
  assert _read(path) == (['one\n\ntwo\n'], 0)


@hypothesis.given(_TEXTS)
def test_json_lines_round_trip(tmp_path_factory, texts):
  path = tmp_path_factory.mktemp('json') / 'a.jsonl'
  path.write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  assert _read(path) == ([text for text in texts if text], 0)


def test_parquet_round_trips(tmp_path):
  path = tmp_path / 'a.parquet'
  parquet.write_table(pa.table({'body': _DOCUMENTS}), path)
  assert _read(path, text_key='body') == (_DOCUMENTS, 0)


@pytest.mark.parametrize('suffix', ['.arrayrecord', '.array_record'])
def test_array_records_round_trip(tmp_path, suffix):
  path = tmp_path / f'a{suffix}'
  # A compiled module without type stubs.
  module = importlib.import_module('array_record.python.array_record_module')
  writer = module.ArrayRecordWriter(str(path), 'group_size:1')
  many = [f'{text} {i}' for i in range(700) for text in _DOCUMENTS]
  for text in many:
    writer.write(text.encode())
  writer.close()
  assert _read(path) == (many, 0)


def test_empty_files_have_no_documents(tmp_path):
  path = tmp_path / 'a.txt'
  path.touch()
  assert _read(path) == ([], 0)


def test_blank_lines_part_documents(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one\nmore\n\n \t\n  two\n\nthree')
  texts, _ = _read(path, document_separator='blank_line')
  assert texts == ['one\nmore', 'two', 'three']


def test_a_literal_line_parts_documents_and_its_text_elsewhere_does_not(
  tmp_path,
):
  path = tmp_path / 'a.txt'
  path.write_text('one\n<.>\ntwo <.>\n<.>')
  texts, _ = _read(path, document_separator='<.>')
  assert texts == ['one\n', 'two <.>\n']


@hypothesis.given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, raw):
  folder = tmp_path_factory.mktemp('any')
  for suffix in corpus.EXTENSIONS:
    path = folder / f'a{suffix}'
    path.write_bytes(raw)
    try:
      _read(path)
    except ValueError as error:
      assert str(path) in str(error)
      assert '\n' not in str(error)


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_bytes(b'a\xffb\xfec\xef\xbf\xbd')
  assert _read(path) == (['a\ufffdb\ufffdc\ufffd'], 2)


def test_invalid_utf8_is_refused_with_its_place(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_bytes(b'abc\xff')
  assert 'byte at 3' in _refusal(path, invalid_utf8='refuse')


def test_invalid_utf8_in_a_later_json_line_is_refused_with_its_place(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
  assert 'byte at 24' in _refusal(path, invalid_utf8='refuse')


def test_a_lone_surrogate_is_replaced_or_refused(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "a\\ud800b"}')
  assert _read(path) == (['a\ufffdb'], 1)
  assert 'line 1' in _refusal(path, invalid_utf8='refuse')


def test_a_binary_file_is_refused(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_bytes(b'text\0')
  assert 'NUL at byte 4' in _refusal(path)


@pytest.mark.parametrize('line', ['{"text": "b"', 'text', '[' * 100_000])
def test_a_broken_json_line_is_refused_with_its_number(tmp_path, line):
  path = tmp_path / 'a.jsonl'
  path.write_text(f'{{"text": "a"}}\n\n{line}\n')
  assert 'line 3 must be a JSON object' in _refusal(path)


@pytest.mark.parametrize(
  'line', ['{"body": "b"}', '{"text": 3}', '["text"]', '"text"', 'null']
)
def test_a_json_line_without_text_is_refused_with_its_number(tmp_path, line):
  path = tmp_path / 'a.jsonl'
  path.write_text(f'{{"text": "a"}}\n{line}\n')
  message = _refusal(path)
  assert 'line 2' in message
  assert "text_key='text'" in message


def test_a_parquet_file_without_the_column_is_refused(tmp_path):
  path = tmp_path / 'a.parquet'
  parquet.write_table(pa.table({'body': _DOCUMENTS}), path)
  assert "['body']" in _refusal(path)


@pytest.mark.parametrize('values', [['a', None], [1, 2]])
def test_a_parquet_row_without_text_is_refused(tmp_path, values):
  path = tmp_path / 'a.parquet'
  parquet.write_table(pa.table({'text': values}), path)
  assert f'row {1 if None in values else 0}' in _refusal(path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('a')
  [file] = corpus.find_files(str(path))
  path.unlink()
  path.mkdir()
  with pytest.raises(ValueError, match='must be readable: Is a directory'):
    list(readers.read_documents(file, readers.ReadOptions()))
