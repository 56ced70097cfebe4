"""Draft trees over ragged caches: the cases that every implementation meets."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from efficient_llm.typing import Array


@dataclasses.dataclass(frozen=True)
class Case:
  """Shapes of one call; positions behind the tail hold NaN."""

  lengths: tuple[int, ...]
  num_tokens: int
  num_heads: int = 4
  num_kv_heads: int = 2
  capacity: int = 300
  head_dim: int = 32
  dtype: str = 'float32'
  num_words: int | None = None


CASES = {
  'a plain token': Case(lengths=(200,), num_tokens=1),
  'an empty cache': Case(lengths=(0, 0), num_tokens=17),
  'ragged rows': Case(lengths=(0, 127, 128, 283), num_tokens=17),
  'a tail over two blocks': Case(lengths=(120, 250), num_tokens=17),
  'a tail over two blocks and two words': Case(
    lengths=(100, 236), num_tokens=64, num_kv_heads=1
  ),
  'a tail that starts a block': Case(lengths=(128, 256), num_tokens=33),
  'more words than tokens': Case(lengths=(90,), num_tokens=5, num_words=2),
  'no groups': Case(lengths=(130,), num_tokens=8, num_kv_heads=4),
  'a cache shorter than a block': Case(
    lengths=(3, 60), num_tokens=4, capacity=64
  ),
  'bfloat16': Case(lengths=(7, 255), num_tokens=17, dtype='bfloat16'),
  'bfloat16 and a wide tree': Case(
    lengths=(200,), num_tokens=64, head_dim=64, dtype='bfloat16'
  ),
}


def parents(num_tokens: int, seed: int) -> np.ndarray:
  """A random tree; the root is its own parent."""
  random = np.random.default_rng(seed)
  return np.array([0] + [random.integers(i) for i in range(1, num_tokens)])


def ancestors(parents_T: np.ndarray) -> np.ndarray:
  """Whether token t has token j on its path to the root, itself included."""
  size = len(parents_T)
  result_TT = np.eye(size, dtype=bool)
  for token in range(1, size):
    result_TT[token] |= result_TT[parents_T[token]]
  return result_TT


def pack(ancestors_TT: np.ndarray, num_words: int) -> np.ndarray:
  """Bit j % 32 of word j // 32 of row t says whether t sees j."""
  words_TU = np.zeros((len(ancestors_TT), num_words), np.uint32)
  for token, other in np.argwhere(ancestors_TT):
    words_TU[token, other // 32] |= np.uint32(1) << np.uint32(other % 32)
  return words_TU


def inputs(case: Case, seed: int = 0) -> tuple[Array, ...]:
  """Queries, keys, values, lengths and masks of a case."""
  random = np.random.default_rng(seed)
  batch_size = len(case.lengths)
  num_words = case.num_words or -(-case.num_tokens // 32)
  queries = (batch_size, case.num_tokens, case.num_heads, case.head_dim)
  cache = (batch_size, case.num_kv_heads, case.capacity, case.head_dim)
  q, k, v = (random.normal(size=shape) for shape in (queries, cache, cache))
  lengths_B = np.array(case.lengths, np.int32)
  unwritten_BS = np.arange(case.capacity) >= lengths_B[:, None] + q.shape[1]
  k, v = (np.where(unwritten_BS[:, None, :, None], np.nan, x) for x in (k, v))
  masks = np.stack(
    [
      pack(ancestors(parents(case.num_tokens, seed + row)), num_words)
      for row in range(batch_size)
    ]
  )
  arrays = (jnp.asarray(x, case.dtype) for x in (q, k, v))
  return (*arrays, jnp.asarray(lengths_B), jnp.asarray(masks))


def attend(
  q: Any, keys: Any, values: Any, lengths: Any, masks: Any
) -> np.ndarray:
  """Attention in float64, one query after the other."""
  q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
  masks = np.asarray(masks)
  group = q.shape[2] // keys.shape[1]
  out = np.zeros(q.shape)
  for row, token, head in np.ndindex(*q.shape[:3]):
    length = int(lengths[row])
    seen = [*range(length)] + [
      length + other
      for other in range(q.shape[1])
      if int(masks[row, token, other // 32]) >> (other % 32) & 1
    ]
    scores = keys[row, head // group, seen] @ q[row, token, head]
    weights = np.exp(scores * q.shape[-1] ** -0.5)
    weights /= weights.sum()
    out[row, token, head] = weights @ values[row, head // group, seen]
  return out
