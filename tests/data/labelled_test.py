"""Tests of texts with labels: files, splits, pairs, refusals."""

import pathlib
from typing import Any

import numpy as np
import pytest

from efficient_llm.data import labelled, labelled_files, tokenizer

_BYTES = tokenizer.ByteTokenizer()
_CSV = 'label,text,more\n' + ''.join(
  f'{"ab"[i % 2]},text {i},more {i}\n' for i in range(40)
)


def _config(path: pathlib.Path, **changes: Any) -> labelled.LabelledConfig:
  fields = {'sequence_length': 16, 'batch_size': 4, **changes}
  return labelled.LabelledConfig(path=str(path), **fields)


def _write(folder: pathlib.Path, content: str, name: str = 'a.csv') -> Any:
  (folder / name).write_text(content, encoding='utf-8')
  return folder / name


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('a.csv', '\ufefflabel,text\n1,"so, ""he"" said"\n0,no\n'),
    ('a.tsv', 'text\tlabel\nso, "he" said\t1\nno\t0\n'),
    (
      'a.jsonl',
      '{"text": "so, \\"he\\" said", "label": 1}\n\n'
      '{"text": "no", "label": "0"}\n',
    ),
  ],
)
def test_rows_are_read_of_every_kind_of_file(
  tmp_path: pathlib.Path, name: str, content: str
) -> None:
  rows = _config(_write(tmp_path, content, name)).read(str(tmp_path / name))
  assert rows == [
    labelled_files.Row(('so, "he" said',), '1'),
    labelled_files.Row(('no',), '0'),
  ]


def test_a_batch_holds_texts_and_the_numbers_of_their_labels(
  tmp_path: pathlib.Path,
) -> None:
  path = _write(tmp_path, 'label,text\nyes,ab\nno,abcdefghijklmnopqrst\n')
  config = _config(path, batch_size=2, validation_fraction=0.0)
  dataset, validation = labelled.open_both(config, _BYTES)
  assert validation is None
  assert dataset.classes.names == ('no', 'yes')
  assert dataset.statistics() == {
    'rows': 2,
    'cut_rows': 1,
    'classes': 2,
    'commonest_share': 0.5,
  }
  batch = dataset.batch_at(0)
  yes = int(np.argmax(batch['targets'][:, 0]))
  short = [_BYTES.bos_id, *b'ab', _BYTES.eos_id]
  np.testing.assert_array_equal(
    batch['tokens'][yes], short + [_BYTES.pad_id] * 12
  )
  np.testing.assert_array_equal(batch['segment_ids'][yes], [1] * 4 + [0] * 12)
  # The end token stays where the text is cut.
  assert batch['tokens'][1 - yes][-1] == _BYTES.eos_id
  assert batch['segment_ids'][1 - yes].all()


@pytest.mark.parametrize(
  ('first', 'second', 'kept'),
  [('ab', 'cd', (2, 2)), ('a' * 30, 'cd', (11, 2)), ('a' * 9, 'c' * 9, (7, 6))],
)
def test_of_a_pair_the_longer_text_is_cut(
  tmp_path: pathlib.Path, first: str, second: str, kept: tuple[int, int]
) -> None:
  path = _write(tmp_path, f'label,text,more\n0,{first},{second}\n1,x,y\n')
  config = _config(path, second_text_key='more', validation_fraction=0.0)
  dataset, _ = labelled.open_both(config, _BYTES)
  batch = dataset.batch_at(0)
  row = int(np.argmax(batch['segment_ids'].sum(1)))
  eos = _BYTES.eos_id
  wanted = [_BYTES.bos_id, *first[: kept[0]].encode(), eos]
  wanted += [*second[: kept[1]].encode(), eos]
  np.testing.assert_array_equal(batch['tokens'][row][: len(wanted)], wanted)
  types = [0] * (kept[0] + 2) + [1] * (kept[1] + 1)
  np.testing.assert_array_equal(
    batch['token_types'][row], types + [0] * (16 - len(types))
  )


def test_no_text_is_in_both_splits(tmp_path: pathlib.Path) -> None:
  path = _write(tmp_path, _CSV + 'b,text 3,again\nb,text 3,and again\n')
  config = _config(path, validation_fraction=0.3)
  train, validation = labelled.open_both(config, _BYTES)
  assert validation is not None
  assert train.num_sequences + validation.num_sequences == 42
  texts = [
    {
      row.tobytes()
      for batch in split.iterate(repeat=False)
      for row in batch['tokens'][batch['loss_weights'][:, 0] > 0]
    }
    for split in (train, validation)
  ]
  assert not texts[0] & texts[1]
  assert len(texts[0] | texts[1]) == 40


def test_rows_of_another_file_are_held_out(tmp_path: pathlib.Path) -> None:
  path = _write(tmp_path, _CSV)
  other = _write(tmp_path, 'text,label\ntext 0,a\nnew,b\n', 'other.csv')
  config = _config(path, validation_path=str(other))
  train, validation = labelled.open_both(config, _BYTES)
  assert validation is not None
  assert (train.num_sequences, validation.num_sequences) == (39, 2)


@pytest.mark.parametrize(
  ('content', 'changes', 'named'),
  [
    (_CSV, {'label_key': 'labl'}, r"have 'labl', found \['label', 'text', 'mo"),
    (_CSV, {'second_text_key': 'b'}, "must have 'b', found"),
    ('label,text\n1,a\n,b\n', {}, r"line 3 .* text under 'label'.* ''"),
    ('label,text\n1,a\n0\n', {}, "line 3 .* text under 'text'.* None"),
    ('label,text\n1,a,b\n0,c\n', {}, 'line 2 .* a cell for each column'),
    ('label,text\n1,"a" b\n', {}, 'must be a .csv file in UTF-8'),
    ('label,text\n1,a\n1,b\n', {}, r"two labels or more .* found \['1'\]"),
    ('label,text\n', {}, 'two labels or more'),
    (_CSV, {'validation_fraction': 0.001}, 'a row for validation'),
    (_CSV, {'path': ''}, 'set data.path'),
    (_CSV, {'path': '/nowhere.csv'}, "'/nowhere.csv' must exist"),
    (_CSV, {'sequence_length': 3}, 'at least 8'),
  ],
)
def test_bad_rows_are_refused_in_one_line(
  tmp_path: pathlib.Path, content: str, changes: dict[str, Any], named: str
) -> None:
  fields = {'path': str(_write(tmp_path, content)), **changes}
  with pytest.raises(ValueError, match=named) as caught:
    labelled.open_both(labelled.LabelledConfig(**fields), _BYTES)
  assert '\n' not in str(caught.value)


def test_a_label_of_the_other_file_alone_is_refused(
  tmp_path: pathlib.Path,
) -> None:
  path = _write(tmp_path, _CSV)
  other = _write(tmp_path, 'text,label\ntext 0,c\n', 'other.csv')
  config = _config(path, validation_path=str(other))
  with pytest.raises(ValueError, match=r"data\.path has not, and has 'c'"):
    labelled.open_both(config, _BYTES)


@pytest.mark.parametrize(
  ('line', 'named'),
  [
    ('{"text": "a"', 'must be a .jsonl file in UTF-8 and is not near line 1'),
    ('[1]', "must have 'text', found list"),
    ('{"text": "a", "label": 0.5}', 'has 0.5'),
  ],
)
def test_a_bad_line_of_json_is_refused(
  tmp_path: pathlib.Path, line: str, named: str
) -> None:
  path = _write(tmp_path, line + '\n', 'a.jsonl')
  with pytest.raises(ValueError, match=named):
    labelled.open_both(_config(path), _BYTES)
