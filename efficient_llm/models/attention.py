"""Attention through maintained implementations: XLA, cuDNN, splash on TPU.

A few tokens behind a cache are the kernel's of `kernels.tree_attention`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from efficient_llm import sharding
from efficient_llm.models import cached_attention, cudnn_attention, kv_cache

Implementation = Literal[
  'auto', 'xla', 'cudnn', 'cudnn_mapped', 'splash', 'pallas_tpu', 'pallas_gpu'
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """Who may attend to whom.

  Attributes:
    causal: A query sees keys up to its own position in the array.
    segment_ids_BT: Packed document of each token; attention stays inside one.
      0 marks padding.
    allowed_BTS: An explicit mask in place of the two above (a KV cache).
    cache_lengths_B: Tokens that the cache holds before the new ones.
    tail_BTT: With a cache, which new tokens see each other; causal where None.
  """

  causal: bool = dataclasses.field(default=True, metadata={'static': True})
  segment_ids_BT: jax.Array | None = None
  allowed_BTS: jax.Array | None = None
  cache_lengths_B: jax.Array | None = None
  tail_BTT: jax.Array | None = None

  def dense(self) -> jax.Array | None:
    """The mask without causality as [B, 1, T, S] booleans."""
    if self.allowed_BTS is not None:
      return self.allowed_BTS[:, None]
    if self.segment_ids_BT is None:
      return None
    ids_BT = self.segment_ids_BT
    return ids_BT[:, None, :, None] == ids_BT[:, None, None, :]


def make_mask(
  *,
  causal: bool,
  num_tokens: int,
  segment_ids_BT: jax.Array | None,
  cache: kv_cache.KVCache | None,
  tail_mask_BTT: jax.Array | None,
) -> Mask:
  """The mask of new tokens, which may stand behind a cache.

  Args:
    causal: Whether a token sees only its past; always so with a cache.
    num_tokens: T, new tokens a row.
    segment_ids_BT: Packed document of each token.
    cache: Past keys and values, before the new ones are appended.
    tail_mask_BTT: With a cache, which new tokens see each other.
  Raises:
    ValueError: If an input would be ignored.
  """
  if cache is None:
    if tail_mask_BTT is not None:
      raise ValueError('tail_mask_BTT needs a cache before it; leave it out.')
    return Mask(causal=causal, segment_ids_BT=segment_ids_BT)
  if segment_ids_BT is not None:
    raise ValueError(
      'segment_ids_BT does not go with a cache, which holds one document a '
      'row; leave one of them out.'
    )
  return Mask(
    causal=causal,
    allowed_BTS=cache.allowed(num_tokens, tail_BTT=tail_mask_BTT),
    cache_lengths_B=cache.lengths_B,
    tail_BTT=tail_mask_BTT,
  )


def choose(implementation: Implementation, platform: str) -> Implementation:
  """The implementation that 'auto' stands for on a platform.

  cuDNN and splash attention work in bfloat16 blocks and are chosen for
  accelerators only; everything else takes XLA.

  Args:
    implementation: As configured.
    platform: As `jax.default_backend` names it.
  """
  if implementation != 'auto':
    return implementation
  chosen = {'gpu': 'cudnn', 'cuda': 'cudnn', 'tpu': 'splash'}
  return cast(Implementation, chosen.get(platform, 'xla'))


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  mask: Mask,
  implementation: Implementation = 'auto',
) -> jax.Array:
  """Scaled dot-product attention with grouped key/value heads.

  Args:
    q_BTNH: Queries; N is a multiple of K.
    k_BSKH: Keys.
    v_BSKH: Values.
    mask: Who may attend to whom.
    implementation: 'auto' goes by platform. What cuDNN or splash cannot do (a
      cache, float32, odd lengths) XLA does; 'pallas_tpu' and 'pallas_gpu' are
      for a few tokens behind a cache.
  """
  if mask.cache_lengths_B is not None:
    attended = cached_attention.tree_attend(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      mask.cache_lengths_B,
      mask.tail_BTT,
      implementation=implementation,
    )
    if attended is not None:
      return attended
  implementation = choose(implementation, jax.default_backend())
  num_queries = q_BTNH.shape[1]
  if implementation == 'splash' and _fits_splash(mask, num_queries):
    return _splash(q_BTNH, k_BSKH, v_BSKH, mask)
  # cuDNN wants half precision and more than a handful of queries.
  half = q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
  if implementation.startswith('cudnn') and half and num_queries >= 64:
    causal = mask.causal and mask.allowed_BTS is None
    attend_to = cudnn_attention.attend
    if implementation == 'cudnn_mapped':
      attend_to = cudnn_attention.attend_mapped
    return attend_to(q_BTNH, k_BSKH, v_BSKH, mask.dense(), causal)
  return _xla(q_BTNH, k_BSKH, v_BSKH, mask)


# From here on the halves save more than a second set of products costs.
_MIN_QUERIES_TO_HALVE = 128


def _xla(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask
) -> jax.Array:
  """XLA's attention, with its two wastes mended.

  The gradient of JAX's softmax defaults to a rule with more passes over the
  [T, T] matrix, and of a causal one it computes all, though the first half of
  the queries sees but half of the keys. On two Xeon cores a train step of 5 M
  parameters takes an eighth less processor time so (8 x 256, jax 0.10.2).
  """
  if mask.cache_lengths_B is not None and mask.allowed_BTS is not None:
    return cached_attention.xla_attend(q_BTNH, k_BSKH, v_BSKH, mask.allowed_BTS)
  num_queries = q_BTNH.shape[1]
  dense = mask.dense()
  causal = mask.causal and mask.allowed_BTS is None
  with jax.softmax_custom_jvp(True):
    if not causal or num_queries < _MIN_QUERIES_TO_HALVE:
      return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=dense, is_causal=causal
      )
    middle = num_queries // 2
    parts = []
    for start, stop in ((0, middle), (middle, num_queries)):
      seen = jnp.tri(stop - start, stop, k=start, dtype=bool)[None, None]
      if dense is not None:
        seen &= dense[:, :, start:stop, :stop]
      part = jax.nn.dot_product_attention(
        q_BTNH[:, start:stop], k_BSKH[:, :stop], v_BSKH[:, :stop], mask=seen
      )
      parts.append(part)
    return jnp.concatenate(parts, axis=1)


def talk(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  mix_logits: Callable[[jax.Array], jax.Array],
  mix_weights: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Attention of all to all whose heads are mixed before and after the softmax.

  Logits of all heads exist at once, so no kernel of `attend` can do it.

  Args:
    q_BTNH: Queries; N is a multiple of K.
    k_BSKH: Keys.
    v_BSKH: Values.
    mix_logits: Of [B, N, T, S], before the softmax.
    mix_weights: Of the same, after it.
  Source: Shazeer et al. 2020, talking-heads attention, arXiv:2003.02436, as in
  Touvron et al. 2021, arXiv:2103.17239.
  """
  group = q_BTNH.shape[2] // k_BSKH.shape[2]
  if group > 1:
    k_BSKH, v_BSKH = (jnp.repeat(x, group, axis=2) for x in (k_BSKH, v_BSKH))
  logits_BNTS = jnp.einsum(
    'BTNH,BSNH->BNTS',
    q_BTNH * q_BTNH.shape[-1] ** -0.5,
    k_BSKH,
    preferred_element_type=jnp.float32,
  )
  weights_BNTS = mix_weights(jax.nn.softmax(mix_logits(logits_BNTS), axis=-1))
  return jnp.einsum(
    'BNTS,BSNH->BTNH', weights_BNTS.astype(v_BSKH.dtype), v_BSKH
  )


def _fits_splash(mask: Mask, num_queries: int) -> bool:
  """Splash needs whole blocks and no cache."""
  return mask.allowed_BTS is None and num_queries % 128 == 0


def _splash(
  q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask: Mask
) -> jax.Array:
  """The TPU kernel, one call per device under shard_map."""
  mesh = jax.sharding.get_abstract_mesh()
  ids_BT = mask.segment_ids_BT
  scale = q_BTNH.shape[-1] ** -0.5
  q_BNTH, k_BKTH, v_BKTH = (
    x.transpose(0, 2, 1, 3) for x in (q_BTNH * scale, k_BTKH, v_BTKH)
  )
  call = functools.partial(_splash_local, causal=mask.causal)
  if not mesh.empty and mesh.size > 1:
    # The fewer key/value heads decide, so that groups stay on one device.
    spec = sharding.divisible_spec(
      k_BKTH.shape, ('batch', 'kv_heads', None, None), mesh
    )
    ids_spec = PartitionSpec(None if ids_BT is None else spec[0])
    call = jax.shard_map(
      call,
      mesh=mesh,
      in_specs=(spec, spec, spec, ids_spec),
      out_specs=spec,
      check_vma=False,
    )
  return call(q_BNTH, k_BKTH, v_BKTH, ids_BT).transpose(0, 2, 1, 3)


def _splash_local(
  q_BNTH: jax.Array,
  k_BKTH: jax.Array,
  v_BKTH: jax.Array,
  ids_BT: jax.Array | None,
  *,
  causal: bool,
) -> jax.Array:
  from jax.experimental.pallas.ops.tpu import splash_attention

  _, num_heads, num_tokens, _ = q_BNTH.shape
  shape = (num_tokens, num_tokens)
  one = (
    splash_attention.CausalMask(shape)
    if causal
    else splash_attention.FullMask(shape)
  )
  multi_head = splash_attention.MultiHeadMask([one] * num_heads)
  block = min(512, num_tokens)
  while num_tokens % block:
    block //= 2
  blocks = splash_attention.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  group = num_heads // k_BKTH.shape[1]
  if group > 1:
    k_BKTH, v_BKTH = (jnp.repeat(x, group, axis=1) for x in (k_BKTH, v_BKTH))
  kernel = splash_attention.make_splash_mha_single_device(
    mask=multi_head, block_sizes=blocks
  )
  ids = None
  if ids_BT is not None:
    ids = splash_attention.SegmentIds(ids_BT, ids_BT)
  return cast(jax.Array, jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, ids))
