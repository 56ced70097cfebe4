"""The cache is whole or absent, is used again, and notices damage."""

import errno
import pathlib

import numpy as np
import pytest

from efficient_llm.data import corpus, readers, staging, token_cache, tokenizer


@pytest.fixture
def source(tmp_path):
  folder = tmp_path / 'text'
  folder.mkdir()
  for number in range(5):
    (folder / f'{number}.txt').write_text(f'document {number} ' * 20)
  return folder


def _open(source, cache_dir, log=lambda line: None, **options):
  return token_cache.open_or_build(
    corpus.find_files(str(source)),
    options=readers.ReadOptions(**options),
    encoder=tokenizer.ByteTokenizer(),
    cache_dir=cache_dir,
    log=log,
  )


def _contents(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(folder.rglob('*'))


def test_the_cache_holds_the_documents(source, tmp_path):
  cache = _open(source, tmp_path / 'cache')
  encoder = tokenizer.ByteTokenizer()
  texts = [
    encoder.decode(cache.tokens[start : start + length])
    for start, length in zip(cache.starts, cache.lengths, strict=True)
  ]
  assert texts == [f'document {number} ' * 20 for number in range(5)]
  assert cache.num_bytes.tolist() == [len(text) for text in texts]
  assert cache.files.tolist() == list(range(5))
  assert len(set(cache.content_hashes.tolist())) == 5


def test_a_second_opening_reads_no_text(source, tmp_path, monkeypatch):
  first = _open(source, tmp_path / 'cache')
  monkeypatch.setattr(readers, 'read_documents', None)
  second = _open(source, tmp_path / 'cache')
  assert first.fingerprint == second.fingerprint
  assert np.array_equal(first.tokens, second.tokens)


def test_changed_text_is_tokenised_again(source, tmp_path):
  before = _open(source, tmp_path / 'cache')
  (source / '3.txt').write_text('something else')
  after = _open(source, tmp_path / 'cache')
  assert before.fingerprint != after.fingerprint


def test_the_fingerprint_does_not_depend_on_where_the_text_is(source, tmp_path):
  before = _open(source, tmp_path / 'cache')
  moved = source.rename(tmp_path / 'moved')
  after = _open(moved, tmp_path / 'other')
  assert before.fingerprint == after.fingerprint


@pytest.mark.parametrize(
  'name', ['tokens.bin', 'documents.bin', 'summary.json']
)
@pytest.mark.parametrize('damage', ['flip', 'truncate', 'remove'])
def test_damage_is_noticed_and_mended(source, tmp_path, name, damage):
  before = _open(source, tmp_path / 'cache')
  tokens = np.array(before.tokens)
  [path] = (tmp_path / 'cache').rglob(name)
  raw = bytearray(path.read_bytes())
  if damage == 'flip':
    raw[len(raw) // 2] ^= 4
  path.unlink()
  if damage != 'remove':
    path.write_bytes(raw[: len(raw) // 2] if damage == 'truncate' else raw)
  lines = []
  after = _open(source, tmp_path / 'cache', log=lines.append)
  assert 'damaged' in lines[0]
  assert after.fingerprint == before.fingerprint
  assert np.array_equal(after.tokens, tokens)


def test_a_full_disk_is_one_line_and_leaves_nothing(
  source, tmp_path, monkeypatch
):
  def fail(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(token_cache.np, 'concatenate', fail)
  with pytest.raises(ValueError, match='No space left on device') as refusal:
    _open(source, tmp_path / 'cache')
  assert '\n' not in str(refusal.value)
  assert not _contents(tmp_path / 'cache')


def test_a_broken_file_leaves_nothing(source, tmp_path):
  (source / '4.txt').write_bytes(b'\0')
  with pytest.raises(ValueError, match='NUL'):
    _open(source, tmp_path / 'cache')
  assert not _contents(tmp_path / 'cache')


def test_a_cache_folder_that_is_a_file_is_refused(source, tmp_path):
  (tmp_path / 'cache').write_text('in the way')
  with pytest.raises(ValueError, match=r'readable|writable'):
    _open(source, tmp_path / 'cache')


def test_invalid_utf8_is_counted_once_and_remembered(source, tmp_path):
  (source / '2.txt').write_bytes(b'a\xff\xfeb')
  counts = [_open(source, tmp_path / 'c').num_invalid_utf8 for _ in range(2)]
  assert counts == [2, 2]


def test_a_staged_folder_gives_way_to_one_made_meanwhile(tmp_path):
  folder = tmp_path / 'made'
  with staging.staged(folder) as staged:
    (staged / 'a').write_text('late')
    folder.mkdir()
    (folder / 'a').write_text('early')
  assert (folder / 'a').read_text() == 'early'
  assert _contents(tmp_path) == [folder, folder / 'a']


def test_a_staged_folder_is_absent_until_it_is_complete(tmp_path):
  folder = tmp_path / 'made'
  with staging.staged(folder) as staged:
    (staged / 'a').write_text('a')
    assert not folder.exists()
  assert (folder / 'a').read_text() == 'a'


def test_another_runs_fresh_entry_is_used_not_replaced(
  source, tmp_path, monkeypatch
):
  build = token_cache._build
  inodes = []

  def overtaken(*arguments):
    build(*arguments)
    monkeypatch.setattr(token_cache, '_build', build)
    _open(source, tmp_path / 'cache')
    [other] = (tmp_path / 'cache').glob('tokens-*/tokens.bin')
    inodes.append(other.stat().st_ino)

  monkeypatch.setattr(token_cache, '_build', overtaken)
  lines = []
  _open(source, tmp_path / 'cache', log=lines.append)
  [kept] = (tmp_path / 'cache').glob('tokens-*/tokens.bin')
  assert inodes == [kept.stat().st_ino]
  assert not lines
