from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import kv_cache, transformer
from tests.models import architectures

ALL = pytest.mark.parametrize('name', architectures.DECODERS)
# Float32 rounding through two layers, in logits of size about 3.
_ROUNDING = 2e-5
_CAPACITY = 8


def _full(name: str, tokens_BT: np.ndarray) -> np.ndarray:
  """Logits without a cache; every call has the same shape."""
  padded_BT = np.zeros((3, _CAPACITY), np.int32)
  padded_BT[: len(tokens_BT), : tokens_BT.shape[1]] = tokens_BT
  config = architectures.ARCHITECTURES[name]
  output = architectures.forward(config, architectures.params(name), padded_BT)
  return np.asarray(output.logits)[: len(tokens_BT), : tokens_BT.shape[1]]


def _empty(name: str) -> kv_cache.KVCache:
  config = architectures.ARCHITECTURES[name]
  return transformer.empty_cache(config, batch_size=3, capacity=_CAPACITY)


def _append(
  name: str, cache: kv_cache.KVCache, tokens_BT: Any, **inputs: Any
) -> tuple[np.ndarray, kv_cache.KVCache]:
  config = architectures.ARCHITECTURES[name]
  output = architectures.forward(
    config, architectures.params(name), tokens_BT, cache=cache, **inputs
  )
  assert output.cache is not None
  return np.asarray(output.logits), output.cache


def _prefill(
  name: str, tokens_BT: np.ndarray, lengths_B: list[int]
) -> tuple[np.ndarray, kv_cache.KVCache]:
  """Four prompt tokens a row, of which some are real."""
  new_B = np.array(lengths_B, np.int32)
  return _append(name, _empty(name), tokens_BT[:, :4], num_new_B=new_B)


@ALL
def test_decoding_token_by_token_equals_the_full_pass(name: str) -> None:
  tokens_BT = architectures.tokens(3, _CAPACITY)
  cache, steps = _empty(name), []
  for index in range(_CAPACITY):
    logits, cache = _append(name, cache, tokens_BT[:, index, None])
    steps.append(logits[:, 0])
  np.testing.assert_allclose(
    np.stack(steps, 1), _full(name, tokens_BT), atol=_ROUNDING
  )
  np.testing.assert_array_equal(cache.lengths_B, [_CAPACITY] * 3)


@ALL
def test_prompts_of_unequal_length_go_on_as_if_alone(name: str) -> None:
  tokens_BT = architectures.tokens(3, 6)
  lengths = [1, 4, 2]
  prefill, cache = _prefill(name, tokens_BT, lengths)
  full = [
    np.concatenate([row[:length], row[4:]])
    for row, length in zip(tokens_BT, lengths, strict=True)
  ]
  first, cache = _append(name, cache, tokens_BT[:, 4:5])
  second, cache = _append(name, cache, tokens_BT[:, 5:6])
  for row, length in enumerate(lengths):
    expected = _full(name, full[row][None])[0]
    got = [prefill[row, :length], first[row], second[row]]
    np.testing.assert_allclose(np.concatenate(got), expected, atol=_ROUNDING)
  np.testing.assert_array_equal(cache.lengths_B, np.add(lengths, 2))


def test_tokens_that_are_not_real_leave_no_trace() -> None:
  tokens_BT = architectures.tokens(3, 6)
  other_BT = tokens_BT.copy()
  other_BT[:, 2:4] = (other_BT[:, 2:4] + 9) % 37
  results = []
  for each_BT in (tokens_BT, other_BT):
    _, cache = _prefill('llama', each_BT, [2, 2, 2])
    results.append(_append('llama', cache, each_BT[:, 4:5])[0])
  np.testing.assert_array_equal(*results)


@ALL
def test_truncated_tokens_are_forgotten(name: str) -> None:
  tokens_BT = architectures.tokens(3, 6)
  _, cache = _prefill(name, tokens_BT, [4, 4, 4])
  cache = cache.truncate(jnp.array([4, 1, 2]))
  logits, _ = _append(name, cache, tokens_BT[:, 4:5])
  for row, kept in enumerate([4, 1, 2]):
    alone = np.append(tokens_BT[row, :kept], tokens_BT[row, 4])
    expected = _full(name, alone[None])[0, -1]
    np.testing.assert_allclose(logits[row, 0], expected, atol=_ROUNDING)


def test_truncating_never_lengthens() -> None:
  cache = _empty('llama').advance(jnp.array([1, 2, 3]))
  shorter = cache.truncate(jnp.array([2, 2, 2]))
  np.testing.assert_array_equal(shorter.lengths_B, [1, 2, 2])


def test_gathered_rows_go_on_like_their_sources() -> None:
  tokens_BT = architectures.tokens(3, 6)
  _, cache = _prefill('llama', tokens_BT, [1, 4, 2])
  rows = np.array([2, 0, 2])
  source, _ = _append('llama', cache, tokens_BT[:, 4:5])
  gathered, after = _append(
    'llama', cache.gather(jnp.asarray(rows)), tokens_BT[rows, 4:5]
  )
  np.testing.assert_allclose(gathered, source[rows], atol=_ROUNDING)
  np.testing.assert_array_equal(after.lengths_B, [3, 2, 3])


# A draft tree of four tokens: 0 -> 1 -> 2, and 0 -> 3.
_BRANCHES = ([0, 1, 2], [0, 3])
_DEPTHS = np.array([0, 1, 2, 1], np.int32)
_ANCESTORS = np.array(
  [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]], bool
)


@ALL
def test_every_branch_of_a_tree_reads_as_if_alone(name: str) -> None:
  tokens_BT = architectures.tokens(3, 8)
  lengths_B = np.array([1, 4, 2], np.int32)
  _, cache = _prefill(name, tokens_BT, lengths_B.tolist())
  tree_BT = tokens_BT[:, 4:]
  logits, _ = _append(
    name,
    cache,
    tree_BT,
    positions_BT=lengths_B[:, None] + _DEPTHS,
    tail_mask_BTT=np.tile(_ANCESTORS, (3, 1, 1)),
  )
  for row, length in enumerate(lengths_B):
    for branch in _BRANCHES:
      alone = np.append(tokens_BT[row, :length], tree_BT[row, branch])
      expected = _full(name, alone[None])[0, -len(branch) :]
      np.testing.assert_allclose(logits[row, branch], expected, atol=_ROUNDING)


def test_a_causal_tail_mask_is_the_default() -> None:
  cache = _empty('llama').advance(jnp.array([0, 2, 4]))
  causal_BTT = jnp.asarray(np.tile(np.tri(4, dtype=bool), (3, 1, 1)))
  np.testing.assert_array_equal(
    cache.allowed(4), cache.allowed(4, tail_BTT=causal_BTT)
  )


def test_a_new_token_sees_what_is_held_and_the_tail_before_it() -> None:
  cache = _empty('llama').advance(jnp.array([0, 2, 5]))
  allowed = np.asarray(cache.allowed(3))
  for row, length in enumerate([0, 2, 5]):
    for token in range(3):
      assert allowed[row, token].nonzero()[0].tolist() == list(
        range(length + token + 1)
      )


def test_a_cache_holds_the_type_of_the_activations() -> None:
  cache = kv_cache.create(
    num_layers=2,
    batch_size=3,
    num_kv_heads=1,
    capacity=5,
    head_dim=4,
    dtype='bfloat16',
  )
  assert cache.capacity == 5
  assert {leaf.dtype for leaf in cache.keys + cache.values} == {
    np.dtype(jnp.bfloat16)
  }
  assert [leaf.shape for leaf in cache.keys] == [(3, 1, 5, 4)] * 2


def test_appending_writes_behind_each_row_and_in_one_layer_only() -> None:
  cache = _empty('llama').advance(jnp.array([0, 2, 6]))
  new = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
  after = cache.append(new, -new, layer=1)
  np.testing.assert_array_equal(after.lengths_B, cache.lengths_B)
  assert not after.keys[0].any()
  for row, start in enumerate([0, 2, 6]):
    keys = np.asarray(after.layer(1)[0])[row]
    np.testing.assert_array_equal(keys[start : start + 2], new[row])
    assert not np.delete(keys, [start, start + 1], axis=0).any()
  np.testing.assert_array_equal(after.layer(1)[1], -after.layer(1)[0])


def test_a_committed_path_closes_up_behind_what_is_held() -> None:
  cache = kv_cache.create(
    num_layers=2, batch_size=3, num_kv_heads=2, capacity=8, head_dim=4
  )
  held_B = jnp.asarray([3, 0, 5])
  tail_BTKH = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
  cache = cache.advance(held_B)
  for layer in range(2):
    cache = cache.append(tail_BTKH + layer, -tail_BTKH, layer=layer)
  before = cache.layer(0)[0]
  path_BT = jnp.asarray([[0, 2, 0], [1, 2, 2], [0, 1, 2]])
  cache = cache.commit(path_BT, jnp.asarray([2, 2, 0]))
  assert cache.lengths_B.tolist() == [5, 2, 5]
  for layer in range(2):
    keys, values = cache.layer(layer)
    np.testing.assert_array_equal(keys[0, 3:5], tail_BTKH[0, [0, 2]] + layer)
    np.testing.assert_array_equal(keys[1, :2], tail_BTKH[1, [1, 2]] + layer)
    np.testing.assert_array_equal(values[1, :2], -tail_BTKH[1, [1, 2]])
  np.testing.assert_array_equal(cache.layer(0)[0][0, :3], before[0, :3])
  np.testing.assert_array_equal(cache.layer(0)[0][2, :5], before[2, :5])


def test_a_single_row_is_written_and_committed_the_same_when_flat() -> None:
  rng = np.random.default_rng(0)
  cache = kv_cache.create(
    num_layers=2, batch_size=1, num_kv_heads=2, capacity=8, head_dim=3
  ).advance(2)
  new = [
    jnp.asarray(rng.normal(size=(1, 4, 2, 3)), jnp.float32) for _ in range(4)
  ]
  path, count = jnp.asarray([[0, 2, 3]]), jnp.asarray([3])

  def write(cache: kv_cache.KVCache) -> kv_cache.KVCache:
    for layer in range(2):
      cache = cache.append(new[2 * layer], new[2 * layer + 1], layer=layer)
    return cache.commit(path, count)

  expected, found = write(cache), write(cache.flat())
  assert found.capacity == expected.capacity
  for layer in range(2):
    for one, other in zip(
      found.layer(layer), expected.layer(layer), strict=True
    ):
      np.testing.assert_array_equal(one, other)
  unflat = found.unflat()
  assert unflat.keys[0].shape == expected.keys[0].shape
  assert int(unflat.lengths_B[0]) == 5
