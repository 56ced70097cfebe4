import json
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm.diloco.wan import messages

_MESSAGE = messages.Message(
  'update',
  {'tokens': 3.5, 'digests': ['a', 'b'], 'first': 4, 'none': None},
  {
    'a/codes': np.arange(12, dtype=np.int8).reshape(3, 4),
    'a/scales': np.zeros((0, 2), np.uint16),
    'b': np.array(2.5, np.float32),
  },
)
_LIMIT = 1 << 16


def test_a_message_comes_back_as_it_was() -> None:
  found = messages.decode(messages.encode(_MESSAGE), max_bytes=_LIMIT)
  assert (found.kind, found.fields) == (_MESSAGE.kind, _MESSAGE.fields)
  assert found.arrays.keys() == _MESSAGE.arrays.keys()
  for name, values in _MESSAGE.arrays.items():
    assert found.arrays[name].dtype == values.dtype
    np.testing.assert_array_equal(found.arrays[name], values)


def test_a_message_that_is_cut_anywhere_is_refused_in_one_line() -> None:
  frame = messages.encode(_MESSAGE)
  for end in range(len(frame)):
    with pytest.raises(messages.MessageError) as error:
      messages.decode(frame[:end], max_bytes=_LIMIT)
    assert '\n' not in str(error.value)


def test_a_message_over_the_limit_is_refused_before_it_is_read() -> None:
  with pytest.raises(messages.MessageError, match='65537 bytes'):
    messages.decode(bytes(_LIMIT + 1), max_bytes=_LIMIT)


def test_what_follows_the_last_array_is_refused() -> None:
  frame = messages.encode(_MESSAGE)
  with pytest.raises(messages.MessageError, match='2 bytes follow'):
    messages.decode(frame + b'xx', max_bytes=_LIMIT)


@hypothesis.given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(noise: bytes) -> None:
  for frame in (noise, b'ISL1' + noise):
    try:
      messages.decode(frame, max_bytes=_LIMIT)
    except messages.MessageError as error:
      assert '\n' not in str(error)


_JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda part: (
    st.lists(part, max_size=3)
    | st.dictionaries(st.text(max_size=5), part, max_size=3)
  ),
  max_leaves=8,
)


@hypothesis.given(_JSON, _JSON, _JSON)
def test_any_header_is_a_message_or_refused(
  kind: Any, fields: Any, arrays: Any
) -> None:
  header = {'kind': kind, 'fields': fields, 'arrays': arrays}
  text = json.dumps(header).encode()
  frame = b'ISL1' + len(text).to_bytes(4, 'little') + text
  try:
    found = messages.decode(frame, max_bytes=_LIMIT)
  except messages.MessageError as error:
    assert '\n' not in str(error)
    return
  for read in (found.integer, found.number, found.text):
    try:
      read('x')
    except messages.MessageError:
      continue


@pytest.mark.parametrize('value', [-1, 1.5, True, '3', None, 1 << 60])
def test_a_count_that_is_none_is_refused(value: object) -> None:
  with pytest.raises(messages.MessageError, match='steps='):
    messages.Message('x', {'steps': value}).integer('steps')


@pytest.mark.parametrize('value', [-1.0, '3', None, True, 1e300, 10**400])
def test_a_number_that_is_none_is_refused(value: object) -> None:
  with pytest.raises(messages.MessageError, match='tokens='):
    messages.Message('x', {'tokens': value}).number('tokens')


def test_a_shape_that_is_too_long_for_numpy_is_refused() -> None:
  frame = messages.encode(
    messages.Message('x', {}, {'a': np.zeros((2, 2, 0), np.int8)})
  )
  long = frame.replace(b'[2,2,0]', b'[%d,%d,0]' % (2**39, 2**39))
  long = long.replace(b'[2, 2, 0]', b'[%d, %d, 0]' % (2**39, 2**39))
  assert long != frame
  header = len(long) - 8
  long = long[:4] + header.to_bytes(4, 'little') + long[8:]
  with pytest.raises(messages.MessageError):
    messages.decode(long, max_bytes=1 << 20)
