"""Tree attention: a draft tree against a long cache and its own ancestors."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from efficient_llm.kernels import selection
from efficient_llm.kernels.tree_attention import (
  pallas_gpu,
  pallas_tpu,
  reference,
)
from efficient_llm.typing import Array, Bool, Float, Int, UInt32, typed

MAX_TREE_TOKENS = 64


@typed
def attend(
  q_BTNH: Float[Array, 'B T N H'],
  keys_BKSH: Float[Array, 'B K S H'],
  values_BKSH: Float[Array, 'B K S H'],
  lengths_B: Int[Array, 'B'],
  masks_BTU: UInt32[Array, 'B T U'],
  *,
  implementation: selection.Implementation | None = None,
  spec: PartitionSpec | None = None,
) -> Float[Array, 'B T N H']:
  """Attends from a draft tree to its cache and to its own ancestors.

  Query t of row b sees the positions s < lengths_B[b], and s = lengths_B[b] + j
  for those j < T whose bit is set: bit j % 32 of masks_BTU[b, t, j // 32].
  Scores are scaled by H ** -0.5 and summed in float32. What the memory holds
  behind lengths_B + T, be it NaN, changes nothing. A query that sees nothing
  gets zeros. Forward only: decoding takes no gradients.

  Args:
    q_BTNH: Queries of the tree, rotary positions applied; N is a multiple of K,
      and query head n reads key/value head n // (N // K).
    keys_BKSH: Cached keys, the tree's own already written behind each length.
    values_BKSH: Cached values likewise.
    lengths_B: Tokens before the tree; lengths_B + T must not exceed S.
    masks_BTU: Packed ancestors of each query, itself included; 32 U >= T.
    implementation: None chooses, see `choose`.
    spec: How the cache is sharded over the mesh: its rows and its heads, as
      XLA cannot split a kernel by itself. None runs a kernel whole.
  Raises:
    ValueError: If the shapes do not go together, or the implementation that
      was asked for cannot take them.
  Source: Dao et al. 2022, FlashAttention, Algorithm 1, arXiv:2205.14135.
    Differs: few queries, a mask on the tail alone, ragged lengths.
  """
  _check(q_BTNH, keys_BKSH, values_BKSH, masks_BTU)
  if implementation is None:
    device = jax.devices()[0]
    implementation = choose(
      q_BTNH,
      keys_BKSH,
      platform=device.platform,
      device_kind=device.device_kind,
    ).implementation
  selection.check(implementation, _refusals(q_BTNH, keys_BKSH))
  arrays = (q_BTNH, keys_BKSH, values_BKSH, lengths_B, masks_BTU)
  if implementation == 'xla':
    return reference.attend(*arrays)
  kernel = pallas_tpu if implementation == 'pallas_tpu' else pallas_gpu
  if spec is None:
    return kernel.attend(*arrays)
  # The key/value heads decide, so that groups stay on one device.
  rows, heads, *_ = (*spec, None, None)
  q_spec = PartitionSpec(rows, None, heads, None)
  cache_spec = PartitionSpec(rows, heads, None, None)
  attend_shard = jax.shard_map(
    kernel.attend,
    in_specs=(
      q_spec,
      cache_spec,
      cache_spec,
      PartitionSpec(rows),
      PartitionSpec(rows),
    ),
    out_specs=q_spec,
    check_vma=False,
  )
  return attend_shard(*arrays)


@typed
def pack(seen_BTT: Bool[Array, 'B T T']) -> UInt32[Array, 'B T U']:
  """Packs who sees whom into words: bit j % 32 of word j // 32 is token j.

  A tree of 64 nodes takes 512 bytes a row so.

  Args:
    seen_BTT: Whether token t sees token j, at [b, t, j].
  """
  bits = reference.BITS_PER_WORD
  num_tokens = seen_BTT.shape[-1]
  num_words = -(-num_tokens // bits)
  padding = ((0, 0), (0, 0), (0, num_words * bits - num_tokens))
  shape = (*seen_BTT.shape[:2], num_words, bits)
  seen_BTUJ = jnp.pad(seen_BTT, padding).reshape(shape).astype(jnp.uint32)
  weights_J = jnp.uint32(1) << jnp.arange(bits, dtype=jnp.uint32)
  return (seen_BTUJ * weights_J).sum(-1, dtype=jnp.uint32)


def choose(
  q_BTNH: Any, keys_BKSH: Any, *, platform: str, device_kind: str = ''
) -> selection.Choice:
  """The implementation that None stands for, and why.

  Args:
    q_BTNH: The queries, or only their shape and dtype.
    keys_BKSH: The cached keys, likewise.
    platform: As a device names it: 'cpu', 'gpu' or 'tpu'.
    device_kind: As a device names it, such as 'NVIDIA H200'.
  """
  return selection.decide(platform, device_kind, _refusals(q_BTNH, keys_BKSH))


def _check(
  q_BTNH: Array, keys_BKSH: Array, values_BKSH: Array, masks_BTU: Array
) -> None:
  """Refuses shapes that no implementation could serve."""
  num_tokens, num_heads = q_BTNH.shape[1:3]
  num_kv_heads, capacity = keys_BKSH.shape[1:3]
  if num_tokens > MAX_TREE_TOKENS:
    raise ValueError(
      f'{num_tokens=} of the tree must be at most {MAX_TREE_TOKENS}; verify '
      'fewer nodes.'
    )
  if num_tokens > capacity:
    raise ValueError(
      f'{num_tokens=} must fit into the cache of {capacity=}; enlarge it.'
    )
  if num_heads % num_kv_heads:
    raise ValueError(
      f'{num_heads=} must be a multiple of {num_kv_heads=}; share heads evenly.'
    )
  if masks_BTU.shape[2] * reference.BITS_PER_WORD < num_tokens:
    raise ValueError(
      f'masks_BTU of {masks_BTU.shape[2]} words must hold a bit for each of '
      f'{num_tokens=}; pack ceil(T / 32) words.'
    )
  if len({q_BTNH.dtype, keys_BKSH.dtype, values_BKSH.dtype}) > 1:
    raise ValueError(
      f'Queries {q_BTNH.dtype}, keys {keys_BKSH.dtype} and values '
      f'{values_BKSH.dtype} must have one dtype; cast the queries.'
    )


def _refusals(
  q_BTNH: Any, keys_BKSH: Any
) -> dict[selection.Implementation, str | None]:
  """Why each kernel cannot take these shapes, if so."""
  return {
    'pallas_tpu': _tpu_refusal(q_BTNH, keys_BKSH),
    'pallas_gpu': _gpu_refusal(q_BTNH, keys_BKSH),
  }


def _tpu_refusal(q_BTNH: Any, keys_BKSH: Any) -> str | None:
  num_tokens, num_heads, head_dim = q_BTNH.shape[1:]
  num_kv_heads, capacity = keys_BKSH.shape[1:3]
  dtype = jnp.dtype(q_BTNH.dtype)
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f'it takes bfloat16 and float32, not {dtype}'
  need = pallas_tpu.vmem_bytes(
    num_rows=num_tokens * num_heads // num_kv_heads,
    capacity=capacity,
    head_dim=head_dim,
    dtype=dtype,
  )
  if need > pallas_tpu.VMEM_LIMIT_BYTES:
    return (
      f'a step needs {need / 2**20:.1f} MiB of vector memory of '
      f'{pallas_tpu.VMEM_LIMIT_BYTES / 2**20:.0f}'
    )
  return None


def _gpu_refusal(q_BTNH: Any, keys_BKSH: Any) -> str | None:
  capacity, head_dim = keys_BKSH.shape[2:]
  dtype = jnp.dtype(q_BTNH.dtype)
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f'it takes bfloat16 and float16, not {dtype}'
  if head_dim not in (64, 128):
    return f'it takes heads of 64 and 128, not {head_dim}'
  if capacity % pallas_gpu.BLOCK:
    return f'a cache of {capacity} is not a multiple of {pallas_gpu.BLOCK}'
  return None
