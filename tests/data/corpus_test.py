"""Paths stand for the same files in the same order everywhere."""

import pytest

from efficient_llm.data import corpus


@pytest.fixture
def folder(tmp_path):
  for name in (
    'b.txt',
    'a/z.md',
    'a/c.py',
    'x.bin',
    '.hidden/h.txt',
    'd.jsonl',
  ):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(name)
  return tmp_path


def _names(path):
  return [file.name for file in corpus.find_files(str(path))]


def test_a_folder_is_searched_and_sorted_and_hidden_files_are_left_out(folder):
  assert _names(folder) == ['a/c.py', 'a/z.md', 'b.txt', 'd.jsonl']


def test_a_glob_finds_known_files_only(folder):
  assert _names(folder / '**' / '*') == ['a/c.py', 'a/z.md', 'b.txt', 'd.jsonl']


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path):
  (tmp_path / 'a[1].txt').write_text('a')
  assert _names(tmp_path / 'a[1].txt') == ['a[1].txt']


def test_the_standard_library_is_there_without_its_tests():
  files = corpus.find_files('stdlib')
  assert sum(file.size_bytes for file in files) > 5_000_000
  folders = {part for file in files for part in file.name.split('/')[:-1]}
  assert folders
  assert not folders & {'test', 'idlelib', 'lib2to3', 'site-packages'}


@pytest.mark.parametrize('name', ['missing.txt', 'missing/', 'none*.txt'])
def test_a_path_where_nothing_is_is_refused(tmp_path, name):
  with pytest.raises(ValueError, match=r'must (exist|hold).*data\.path'):
    corpus.find_files(str(tmp_path / name))


def test_a_folder_without_known_files_is_refused(tmp_path):
  (tmp_path / 'a.bin').write_text('a')
  with pytest.raises(ValueError, match='must hold files ending in'):
    corpus.find_files(str(tmp_path))


def test_a_file_of_unknown_kind_is_refused(tmp_path):
  (tmp_path / 'a.bin').write_text('a')
  with pytest.raises(ValueError, match='must hold files ending in'):
    corpus.find_files(str(tmp_path / 'a.bin'))


def test_a_link_to_nowhere_is_refused_by_name(tmp_path):
  (tmp_path / 'a.txt').symlink_to(tmp_path / 'gone.txt')
  with pytest.raises(ValueError, match=r'a\.txt.*must be readable: No such'):
    corpus.find_files(str(tmp_path))
