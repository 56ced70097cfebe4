"""Keys and values of past tokens: create, append, advance, truncate, gather."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from efficient_llm.typing import Array, Float, Int, typed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """One array per layer, so that a decode step updates it in place.

  Heads come before positions: on a CPU one query then reads each head's keys in
  one sweep, up to five times faster per call in a batch.

  Attributes:
    keys: One [B, K, S, H] array per layer.
    values: The same for values.
    lengths_B: Tokens each row holds; what lies behind is never attended to.
  """

  keys: tuple[Float[Array, 'B K S H'], ...]
  values: tuple[Float[Array, 'B K S H'], ...]
  lengths_B: Int[Array, 'B']

  @property
  def capacity(self) -> int:
    return self.keys[0].shape[-2]

  @property
  def is_flat(self) -> bool:
    return self.keys[0].ndim == 3

  def flat(self) -> 'KVCache':
    """The cache of a single row with arrays [K, S, H], as loops want it.

    XLA drops an axis of length 1 before a product; from then on the array that
    is multiplied is not the one that the loop carries, and both are copied.
    """
    keys, values = ([x[0] for x in a] for a in (self.keys, self.values))
    return KVCache(tuple(keys), tuple(values), self.lengths_B)

  def unflat(self) -> 'KVCache':
    """Undoes `flat`."""
    keys, values = ([x[None] for x in a] for a in (self.keys, self.values))
    return KVCache(tuple(keys), tuple(values), self.lengths_B)

  def layer(self, layer: int) -> tuple[Array, Array]:
    """Keys and values as [B, S, K, H]; the transpose folds into the dot."""
    keys, values = self.keys[layer], self.values[layer]
    if self.is_flat:
      keys, values = keys[None], values[None]
    return keys.swapaxes(1, 2), values.swapaxes(1, 2)

  def append(
    self,
    k_BTKH: Float[Array, 'B T K H'],
    v_BTKH: Float[Array, 'B T K H'],
    *,
    layer: int,
  ) -> 'KVCache':
    """Writes one layer's new tokens behind each row's length.

    Lengths move only with `advance`, once every layer has written. The caller
    sees to it that lengths + T stay within the capacity.

    Args:
      k_BTKH: Keys, rotary positions applied.
      v_BTKH: Values.
      layer: Whose they are.
    """
    keys, values = list(self.keys), list(self.values)
    for arrays, new_BTKH in ((keys, k_BTKH), (values, v_BTKH)):
      new_BKTH = new_BTKH.swapaxes(1, 2)
      arrays[layer] = _write(arrays[layer], new_BKTH, self.lengths_B)
    return dataclasses.replace(self, keys=tuple(keys), values=tuple(values))

  def advance(self, num_tokens_B: Int[Array, 'B'] | int) -> 'KVCache':
    """Counts newly written tokens as held."""
    return dataclasses.replace(self, lengths_B=self.lengths_B + num_tokens_B)

  def commit(
    self, path_BT: Int[Array, 'B T'], num_tokens_B: Int[Array, 'B']
  ) -> 'KVCache':
    """Keeps one path of a written tail and counts it as held.

    Args:
      path_BT: Which of the tokens written last stand on the path, in order,
        counted from each row's length.
      num_tokens_B: How many of them to keep; the rest of the tail is forgotten.
    """
    places_BT = jnp.minimum(
      self.lengths_B[:, None] + path_BT, self.capacity - 1
    )
    take = jax.vmap(functools.partial(jnp.take, axis=1))

    def move(x: Array) -> Array:
      path_BKTH = take(x[None] if self.is_flat else x, places_BT)
      return _write(x, path_BKTH, self.lengths_B)

    keys, values = (
      tuple(map(move, arrays)) for arrays in (self.keys, self.values)
    )
    return dataclasses.replace(self, keys=keys, values=values).advance(
      num_tokens_B
    )

  def widen(self, capacity: int) -> 'KVCache':
    """The same with room for more tokens.

    Args:
      capacity: Of the result, at least that of this cache.
    """
    room = ((0, 0), (0, 0), (0, capacity - self.capacity), (0, 0))
    keys, values = (
      tuple(jnp.pad(x, room) for x in arrays)
      for arrays in (self.keys, self.values)
    )
    return dataclasses.replace(self, keys=keys, values=values)

  def truncate(self, lengths_B: Int[Array, 'B']) -> 'KVCache':
    """Forgets what lies behind the given lengths."""
    lengths_B = jnp.minimum(self.lengths_B, lengths_B)
    return dataclasses.replace(self, lengths_B=lengths_B)

  def gather(self, rows: Int[Array, 'B2']) -> 'KVCache':
    """Keeps, repeats or reorders rows of the batch."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), self)

  def allowed(
    self,
    num_tokens: int,
    *,
    tail_BTT: Array | None = None,
  ) -> Array:
    """Mask [B, T, S] of T new tokens: all held ones, and the tail's own rule.

    Args:
      num_tokens: T, the tokens about to be appended.
      tail_BTT: Whether new token t may see new token s (ancestors of a draft
        tree); causal by default.
    """
    offsets_BS = jnp.arange(self.capacity)[None] - self.lengths_B[:, None]
    held_BTS = (offsets_BS < 0)[:, None]
    if tail_BTT is None:
      return offsets_BS[:, None] <= jnp.arange(num_tokens)[None, :, None]
    index_BTS = jnp.broadcast_to(
      jnp.clip(offsets_BS, 0, num_tokens - 1)[:, None],
      (*tail_BTT.shape[:2], self.capacity),
    )
    in_tail_BTS = (offsets_BS < num_tokens)[:, None]
    tail_BTS = jnp.take_along_axis(tail_BTT, index_BTS, axis=2)
    return held_BTS | (in_tail_BTS & tail_BTS)


def _write(buffer_BKSH: Array, new_BKTH: Array, starts_B: Array) -> Array:
  """Writes each row's new entries from its start on."""
  new_BKTH = new_BKTH.astype(buffer_BKSH.dtype)
  if buffer_BKSH.ndim == 3:
    starts = (0, starts_B[0], 0)
    return jax.lax.dynamic_update_slice(buffer_BKSH, new_BKTH[0], starts)

  def write(row_KSH: Array, new_KTH: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice(row_KSH, new_KTH, (0, start, 0))

  return jax.vmap(write)(buffer_BKSH, new_BKTH, starts_B)


@typed
def create(
  *,
  num_layers: int,
  batch_size: int,
  num_kv_heads: int,
  capacity: int,
  head_dim: int,
  dtype: str = 'float32',
) -> KVCache:
  """An empty cache for `capacity` tokens a row.

  Args:
    num_layers: Layers that write to it.
    batch_size: Rows.
    num_kv_heads: Key/value heads of a layer.
    capacity: Most tokens of a row.
    head_dim: Size of a head.
    dtype: Type of the activations that are kept.
  """
  shape = (batch_size, num_kv_heads, capacity, head_dim)

  def empty() -> tuple[Array, ...]:
    return tuple(jnp.zeros(shape, jnp.dtype(dtype)) for _ in range(num_layers))

  return KVCache(empty(), empty(), jnp.zeros(batch_size, jnp.int32))
