"""Headers and index files that nobody meant well with.

Whatever the bytes are: they are read right or refused in one line, at once,
and without more memory than the file has and Python needs for its text.
"""

import json
import pathlib
import random
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm.models.huggingface import safetensors_file, shards
from tests.models.huggingface import made

_FEW = hypothesis.settings(
  max_examples=250,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
# Python's own: the text as characters, parsed, and spelled in a message. The
# longest that are tried have some 40,000 bytes.
_PYTHON_BYTES = 150_000
_WHOLE = made.pack({'a': np.zeros((2, 3), 'f4'), 'b': np.ones(4, 'f2')})
_NUMBERS = st.one_of(
  st.integers(-2, 30), st.integers(-(2**70), 2**70), st.just(10**4000)
)
_JSON = st.recursive(
  st.none() | st.booleans() | _NUMBERS | st.floats() | st.text(max_size=8),
  lambda inner: (
    st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8), inner, max_size=4)
  ),
  max_leaves=12,
)
_ENTRIES = st.dictionaries(
  st.text(max_size=6) | st.just('__metadata__'),
  st.fixed_dictionaries(
    {
      'dtype': st.sampled_from(['F32', 'BF16', 'I64', 'F4', '', 'f32']) | _JSON,
      'shape': st.lists(_NUMBERS, max_size=4) | _JSON,
      'data_offsets': st.lists(_NUMBERS, min_size=2, max_size=2) | _JSON,
    }
  )
  | _JSON,
  max_size=4,
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return tmp_path_factory.mktemp('fuzz')


def _survives(read: Callable[[], Any], num_bytes: int) -> Any:
  """What was read, None where it was refused as it should be."""
  tracemalloc.start()
  try:
    return read()
  except ValueError as error:
    line = str(error)
    assert '\n' not in line and line.isascii() and len(line) < 2_000
    assert ' must ' in line
    return None
  finally:
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The tensors that a header speaks of may be as large as 2**70.
    assert peak < num_bytes + _PYTHON_BYTES


def _check_header(folder: pathlib.Path, content: bytes) -> None:
  path = folder / 'model.safetensors'
  path.write_bytes(content)
  header = _survives(lambda: safetensors_file.read_header(path), len(content))
  if header is None:
    return
  # What was believed is borne out by the file.
  ends = 0
  for entry in header.entries.values():
    assert entry.start + entry.num_bytes <= len(content)
    ends += entry.num_bytes
  (length,) = struct.unpack('<Q', content[:8])
  assert 8 + length + ends == len(content)


@_FEW
@hypothesis.given(content=st.binary(max_size=200))
def test_any_bytes(folder: pathlib.Path, content: bytes) -> None:
  _check_header(folder, content)


@_FEW
@hypothesis.given(
  document=_ENTRIES | _JSON,
  data=st.integers(0, 100),
  length=st.none() | st.integers(0, 2**64 - 1),
)
def test_any_header(
  folder: pathlib.Path, document: Any, data: int, length: int | None
) -> None:
  text = json.dumps(document).encode() if _spells(document) else b'1' * 5000
  prefix = struct.pack('<Q', len(text) if length is None else length)
  _check_header(folder, prefix + text + bytes(data))


def _spells(document: Any) -> bool:
  try:
    json.dumps(document)
  except ValueError:
    return False
  return True


@_FEW
@hypothesis.given(
  place=st.integers(0, len(_WHOLE) - 1),
  value=st.integers(0, 255),
  cut=st.integers(0, 3),
  seed=st.integers(0, 3),
)
def test_a_file_with_a_few_wrong_bytes(
  folder: pathlib.Path, place: int, value: int, cut: int, seed: int
) -> None:
  content = bytearray(_WHOLE)
  content[place] = value
  rng = random.Random(seed)
  for _ in range(seed):
    content[rng.randrange(len(content))] = rng.randrange(256)
  _check_header(folder, bytes(content[: len(content) - cut]))


@_FEW
@hypothesis.given(
  document=st.fixed_dictionaries(
    {
      'weight_map': _JSON
      | st.dictionaries(
        st.sampled_from('abc'),
        st.sampled_from(
          ['model.safetensors', 'x.safetensors', '../a.safetensors', '/etc/x']
        )
        | _JSON,
        max_size=3,
      )
    }
  )
  | _JSON
)
def test_any_index(folder: pathlib.Path, document: Any) -> None:
  (folder / 'model.safetensors').write_bytes(_WHOLE)
  path = folder / shards.INDEX
  text = json.dumps(document) if _spells(document) else '1' * 5000
  path.write_text(text)
  try:
    found = _survives(
      lambda: shards.open_folder(folder), len(text) + len(_WHOLE)
    )
  finally:
    path.unlink()
  assert found is None or set(found) == {'a', 'b'}


def test_a_large_file_is_not_read_for_its_header(folder: pathlib.Path) -> None:
  size = 1 << 30
  entry = {'dtype': 'F32', 'shape': [size // 4], 'data_offsets': [0, size]}
  text = json.dumps({'a': entry}).encode()
  path = folder / 'large.safetensors'
  with path.open('wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    # A hole, which takes no space.
    file.truncate(8 + len(text) + size)
  header = _survives(lambda: safetensors_file.read_header(path), 8 + len(text))
  assert header.entries['a'].num_bytes == size


def test_deep_nesting_is_refused(folder: pathlib.Path) -> None:
  text = b'[' * 100_000
  path = folder / 'deep.safetensors'
  path.write_bytes(struct.pack('<Q', len(text)) + text)
  with pytest.raises(ValueError, match='strict JSON'):
    safetensors_file.read_header(path)


@pytest.mark.parametrize(
  ('entry', 'said'),
  [
    ({'dtype': 'F4'}, 'a dtype of BOOL'),
    ({'shape': [True]}, 'a shape, says'),
    ({'shape': [2**62, 2**62]}, 'bytes, gives it 8'),
    ({'data_offsets': [0, 9]}, 'within its 8 bytes'),
    ({'data_offsets': [4, 0]}, 'within its 8 bytes'),
    ({'data_offsets': [4, 8], 'shape': [1]}, 'begin at byte 0'),
    ({'data_offsets': [0, 4], 'shape': [1]}, 'as its header says'),
    ({'more': 1}, 'alone'),
  ],
)
def test_a_wrong_entry_is_refused_with_its_rule(
  entry: dict[str, Any], said: str, tmp_path: pathlib.Path
) -> None:
  good = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}
  text = json.dumps({'a': {**good, **entry}}).encode()
  path = tmp_path / 'model.safetensors'
  path.write_bytes(struct.pack('<Q', len(text)) + text + bytes(8))
  with pytest.raises(ValueError, match=said):
    safetensors_file.read_header(path)


def test_tensors_that_overlap_are_refused(tmp_path: pathlib.Path) -> None:
  entry = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}
  text = json.dumps({'a': entry, 'b': entry}).encode()
  path = tmp_path / 'model.safetensors'
  path.write_bytes(struct.pack('<Q', len(text)) + text + bytes(8))
  with pytest.raises(ValueError, match='begin at byte 8'):
    safetensors_file.read_header(path)
  twice = b'{"a":1,"a":1}'
  path.write_bytes(struct.pack('<Q', len(twice)) + twice)
  with pytest.raises(ValueError, match='stands twice'):
    safetensors_file.read_header(path)


def test_a_pipe_is_not_waited_for(tmp_path: pathlib.Path) -> None:
  import os

  path = tmp_path / 'model.safetensors'
  os.mkfifo(path)
  with pytest.raises(ValueError, match='be a file'):
    safetensors_file.read_header(path)
