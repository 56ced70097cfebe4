import json
import pathlib

import hypothesis
import pytest
from hypothesis import strategies as st

from efficient_llm.training import manifest

_LEAVES = (manifest.Leaf('params/w', (2, 3), 'float32'),)
_FILES = {
  'state/d/data': b'weights' * 9,
  'state/_METADATA': b'{}',
  'a.json': b'1',
}

names = st.text(
  st.characters(codec='ascii', categories=('L', 'N', 'P')), min_size=1
).filter(lambda name: '/' not in name and '\\' not in name and name.strip('.'))
manifests = st.builds(
  manifest.Manifest,
  step=st.integers(0, 10**12),
  files=st.dictionaries(
    names.filter(lambda name: name != manifest.FILE_NAME),
    st.builds(
      manifest.FileEntry,
      num_bytes=st.integers(0, 2**60),
      sha256=st.from_regex(r'[0-9a-f]{64}', fullmatch=True),
    ),
    max_size=4,
  ),
  leaves=st.lists(
    st.builds(
      manifest.Leaf,
      path=st.text(max_size=8),
      shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
      dtype=st.sampled_from(['float32', 'bfloat16', 'int8']),
    ),
    max_size=3,
  ).map(tuple),
)
json_values = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  for name, data in _FILES.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  manifest.write(tmp_path, step=7, leaves=_LEAVES)
  return tmp_path


def _problems(folder: pathlib.Path) -> dict[str, str]:
  return {
    finding.file: finding.problem for finding in manifest.verify(folder, step=7)
  }


def test_a_whole_folder_has_no_findings(folder: pathlib.Path) -> None:
  assert manifest.verify(folder, step=7) == []


def test_reading_gives_what_was_written(folder: pathlib.Path) -> None:
  read = manifest.read(folder)
  assert (read.step, read.leaves) == (7, _LEAVES)
  assert {n: e.num_bytes for n, e in read.files.items()} == {
    name: len(data) for name, data in _FILES.items()
  }


@pytest.mark.parametrize('name', _FILES)
def test_every_flipped_bit_of_a_file_is_found(
  folder: pathlib.Path, name: str
) -> None:
  data = _FILES[name]
  for bit in range(8 * len(data)):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(changed)
    assert _problems(folder) == {name: 'has changed contents'}


def test_every_flipped_bit_of_the_manifest_is_found(
  folder: pathlib.Path,
) -> None:
  data = (folder / manifest.FILE_NAME).read_bytes()
  for bit in range(8 * len(data)):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=r'manifest|hash'):
      manifest.decode(bytes(changed))


def test_every_truncation_of_the_manifest_is_found(
  folder: pathlib.Path,
) -> None:
  data = (folder / manifest.FILE_NAME).read_bytes()
  for size in range(len(data)):
    with pytest.raises(ValueError, match=r'manifest|hash'):
      manifest.decode(data[:size])


def test_a_truncated_file_is_found_with_its_sizes(folder: pathlib.Path) -> None:
  (folder / 'state/d/data').write_bytes(b'weights')
  assert _problems(folder) == {'state/d/data': 'has 7 bytes instead of 63'}


def test_a_missing_file_is_found(folder: pathlib.Path) -> None:
  (folder / 'a.json').unlink()
  assert _problems(folder) == {'a.json': 'is missing'}


def test_a_file_that_was_not_saved_is_found(folder: pathlib.Path) -> None:
  (folder / 'state/extra').touch()
  assert _problems(folder) == {"'state/extra'": 'is not in the manifest'}


def test_a_link_in_place_of_a_file_is_found(
  folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
  elsewhere = tmp_path_factory.mktemp('elsewhere') / 'a.json'
  (folder / 'a.json').replace(elsewhere)
  (folder / 'a.json').symlink_to(elsewhere)
  assert _problems(folder) == {'a.json': 'is not a plain file'}


def test_a_link_in_place_of_a_folder_is_found(
  folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
  elsewhere = tmp_path_factory.mktemp('elsewhere') / 'state'
  (folder / 'state').replace(elsewhere)
  (folder / 'state').symlink_to(elsewhere)
  assert "'state'" in _problems(folder)


def test_a_missing_manifest_is_found(folder: pathlib.Path) -> None:
  (folder / manifest.FILE_NAME).unlink()
  assert _problems(folder) == {manifest.FILE_NAME: 'is missing'}


def test_the_manifest_of_another_step_is_found(folder: pathlib.Path) -> None:
  (finding,) = manifest.verify(folder, step=8)
  assert str(finding) == 'step 8: MANIFEST.json belongs to step 7'


def test_writing_refuses_a_link(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'link').symlink_to('/etc/hostname')
  with pytest.raises(ValueError, match='must be a plain file'):
    manifest.write(tmp_path, step=1, leaves=())


@hypothesis.given(manifests)
def test_decoding_inverts_encoding(original: manifest.Manifest) -> None:
  assert manifest.decode(manifest.encode(original)) == original


@hypothesis.given(st.binary())
def test_random_bytes_are_refused(data: bytes) -> None:
  with pytest.raises(ValueError, match=r'manifest|hash'):
    manifest.decode(data)


@hypothesis.given(json_values)
def test_any_other_json_is_refused(value: object) -> None:
  with pytest.raises(ValueError, match=r'manifest|hash'):
    manifest.decode(json.dumps(value).encode())


@hypothesis.given(
  manifests, st.sampled_from(['files', 'leaves', 'step', 'format']), json_values
)
def test_a_field_of_another_value_is_refused(
  original: manifest.Manifest, field: str, value: object
) -> None:
  document = json.loads(manifest.encode(original))
  hypothesis.assume(document[field] != value)
  document[field] = value
  with pytest.raises(ValueError, match=r'manifest|hash'):
    manifest.decode(json.dumps(document, indent=1, sort_keys=True).encode())


@pytest.mark.parametrize(
  'name',
  [
    '../outside',
    'state/../../outside',
    '/etc/passwd',
    'state//d',
    'state/',
    './state',
    '',
    'a\\b',
    'nul\0',
    'line\nbreak',
    'n' * 2000,
    manifest.FILE_NAME,
  ],
)
def test_a_hostile_file_name_is_refused_even_with_a_right_hash(
  name: str,
) -> None:
  hostile = manifest.Manifest(1, {name: manifest.FileEntry(1, '0' * 64)}, ())
  with pytest.raises(ValueError, match='not a readable manifest'):
    manifest.decode(manifest.encode(hostile))


def test_deeply_nested_json_is_refused() -> None:
  with pytest.raises(ValueError, match='not a readable manifest'):
    manifest.decode(b'[' * 200_000)


def test_a_manifest_too_large_to_be_one_is_refused() -> None:
  with pytest.raises(ValueError, match='larger than'):
    manifest.decode(b' ' * (manifest.MAX_BYTES + 1))


def test_a_number_of_too_many_digits_is_refused() -> None:
  with pytest.raises(ValueError, match='not a readable manifest'):
    manifest.decode(b'{"step": ' + b'9' * 10_000 + b'}')


def test_a_failed_write_leaves_the_old_file(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  path = tmp_path / 'file'
  manifest.write_atomically(path, b'old')

  def fail(descriptor: int) -> None:
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('os.fsync', fail)
  with pytest.raises(OSError, match='No space left'):
    manifest.write_atomically(path, b'new')
  assert path.read_bytes() == b'old'


def test_every_file_is_flushed_before_the_manifest_appears(
  folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  (folder / manifest.FILE_NAME).unlink()
  flushed: set[str] = set()

  def note(path: pathlib.Path) -> None:
    if not (folder / manifest.FILE_NAME).exists():
      flushed.add(path.relative_to(folder).as_posix())

  monkeypatch.setattr(manifest, 'flush', note)
  manifest.write(folder, step=7, leaves=_LEAVES)
  assert flushed == {*_FILES, 'state', 'state/d'}
