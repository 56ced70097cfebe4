"""Keys and values of past tokens: create, append, advance, truncate, gather."""

import dataclasses

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
    return self.keys[0].shape[2]

  def layer(self, layer: int) -> tuple[Array, Array]:
    """Keys and values as [B, S, K, H]; the transpose folds into the dot."""
    return (
      self.keys[layer].swapaxes(1, 2),
      self.values[layer].swapaxes(1, 2),
    )

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

    def write(row_KSH: Array, new_TKH: Array, start: Array) -> Array:
      new_KTH = new_TKH.swapaxes(0, 1).astype(row_KSH.dtype)
      return jax.lax.dynamic_update_slice(row_KSH, new_KTH, (0, start, 0))

    write_rows = jax.vmap(write)
    keys, values = list(self.keys), list(self.values)
    keys[layer] = write_rows(keys[layer], k_BTKH, self.lengths_B)
    values[layer] = write_rows(values[layer], v_BTKH, self.lengths_B)
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
    num_read = self.keys[0].shape[2]
    places_BT = jnp.minimum(self.lengths_B[:, None] + path_BT, num_read - 1)

    def move(row_KSH: Array, places_T: Array, start: Array) -> Array:
      path_KTH = jnp.take(row_KSH, places_T, axis=1)
      return jax.lax.dynamic_update_slice(row_KSH, path_KTH, (0, start, 0))

    move_rows = jax.vmap(move)
    keys, values = (
      tuple(move_rows(x, places_BT, self.lengths_B) for x in arrays)
      for arrays in (self.keys, self.values)
    )
    return dataclasses.replace(self, keys=keys, values=values).advance(
      num_tokens_B
    )

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
