import dataclasses
import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficient_llm.training import strict_json

_VALUES = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.text()
  | st.floats(allow_nan=False, allow_infinity=False),
  lambda parts: st.lists(parts) | st.dictionaries(st.text(), parts),
  max_leaves=20,
)


@dataclasses.dataclass(frozen=True)
class _Inner:
  sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class _Outer:
  inner: _Inner = _Inner()
  rate: float = math.inf


def _refuse(constant):
  raise AssertionError(f'{constant} is not strict JSON')


@given(_VALUES)
def test_what_json_can_hold_comes_back_as_it_was(value):
  assert json.loads(strict_json.to_json(value)) == value


@given(st.lists(st.floats(), max_size=8))
def test_numbers_that_are_not_finite_become_text(values):
  text = strict_json.to_json(values)
  read = json.loads(text, parse_constant=_refuse)
  assert np.array_equal([float(v) for v in read], values, equal_nan=True)


def test_nested_dataclasses_become_objects():
  read = json.loads(strict_json.to_json(_Outer()))
  assert read == {'inner': {'sizes': [1, 2]}, 'rate': 'inf'}


def test_arrays_and_scalars_of_numpy_and_jax_become_numbers():
  value = {
    'bfloat16': jnp.asarray([0.5, 2.0], jnp.bfloat16),
    'whole': np.int64(2**60),
    'flag': np.bool_(True),
    'path': pathlib.PurePosixPath('a/b'),
  }
  read = json.loads(strict_json.to_json(value))
  assert read == {
    'bfloat16': [0.5, 2.0],
    'whole': 2**60,
    'flag': True,
    'path': 'a/b',
  }


def test_an_object_that_json_cannot_hold_is_named_with_its_place():
  with pytest.raises(ValueError, match=r'^value\.a\[1\] must be .* is set;'):
    strict_json.to_json({'a': [1, {2}]})


def test_a_failed_replacement_leaves_the_old_file_alone(tmp_path, monkeypatch):
  path = tmp_path / 'result.json'
  strict_json.write_atomically(path, 'old')

  def fail(*unused):
    raise OSError('No space left on device')

  monkeypatch.setattr(pathlib.Path, 'replace', fail)
  with pytest.raises(OSError, match='No space left'):
    strict_json.write_atomically(path, 'new')
  assert [p.name for p in tmp_path.iterdir()] == ['result.json']
  assert path.read_text() == 'old'
