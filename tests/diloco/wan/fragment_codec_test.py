import jax
import numpy as np
import pytest

from efficient_llm.diloco import compression
from efficient_llm.diloco.wan import fragment_codec, messages

_FRAGMENT = {
  'a': np.linspace(-1, 1, 48, dtype=np.float32).reshape(4, 12),
  'b': np.array([3.0, -2.0, 0.5], np.float32),
}
_SHAPES = fragment_codec.shapes_of(_FRAGMENT)


def _codec(**changes) -> fragment_codec.Codec:
  config = compression.CompressionConfig(block_size=8, **changes)
  return fragment_codec.Codec(config, [_SHAPES])


@pytest.mark.parametrize(
  'changes',
  [
    {'format': 'float32'},
    {'format': 'int4'},
    {'format': 'int8', 'density': 0.5},
  ],
)
def test_what_is_sent_decodes_to_what_its_sender_applied(changes: dict) -> None:
  codec = _codec(**changes)
  owed = {name: np.zeros_like(x) for name, x in _FRAGMENT.items()}
  arrays, decoded, left = codec.compress(_FRAGMENT, owed)
  frame = messages.encode(messages.Message('x', {}, arrays))
  found = codec.decode(messages.decode(frame, max_bytes=1 << 16).arrays, 0)
  assert left is not None
  for name, x in _FRAGMENT.items():
    np.testing.assert_array_equal(found[name], decoded[name])
    # A sum of two float32 numbers of size 3.
    np.testing.assert_allclose(found[name] + left[name], x, atol=1e-6)
  assert sum(x.nbytes for x in arrays.values()) == codec.num_bytes(0)


def test_another_update_of_a_fragment_compiles_nothing(
  caplog: pytest.LogCaptureFixture,
) -> None:
  def exchange() -> None:
    codec = _codec(format='int4')
    owed = {name: np.zeros_like(x) for name, x in _FRAGMENT.items()}
    arrays, _, owed = codec.compress(_FRAGMENT, owed)
    codec.compress(_FRAGMENT, owed)
    codec.decode(arrays, 0)

  exchange()
  with jax.log_compiles():
    exchange()
  assert 'Compiling' not in caplog.text


@pytest.mark.parametrize(
  ('change', 'line'),
  [
    (lambda x: x.pop('a/codes'), "array 'a/codes' must be uint8"),
    (lambda x: x.update(c=x['a/codes']), "array 'c' is not of fragment 0"),
    (
      lambda x: x.update({'a/codes': x['a/codes'][:1]}),
      "array 'a/codes' must be uint8",
    ),
    (
      lambda x: x.update({'a/codes': x['a/codes'].astype(np.int8)}),
      "array 'a/codes' must be uint8",
    ),
  ],
)
def test_arrays_of_another_fragment_are_refused(change, line: str) -> None:
  codec = _codec(format='int4')
  arrays, _, _ = codec.compress(_FRAGMENT, None)
  change(arrays)
  with pytest.raises(messages.MessageError, match=line):
    codec.decode(arrays, 0)


def test_places_outside_a_block_are_refused() -> None:
  codec = _codec(format='int8', density=0.5)
  arrays, _, _ = codec.compress(_FRAGMENT, None)
  arrays['a/indices'] = arrays['a/indices'] + 8
  with pytest.raises(messages.MessageError, match='places below'):
    codec.decode(arrays, 0)


def test_a_hash_changes_with_any_bit() -> None:
  other = {name: x.copy() for name, x in _FRAGMENT.items()}
  assert fragment_codec.digest(other) == fragment_codec.digest(_FRAGMENT)
  other['b'][1] = np.nextafter(other['b'][1], 0, dtype=np.float32)
  assert fragment_codec.digest(other) != fragment_codec.digest(_FRAGMENT)
