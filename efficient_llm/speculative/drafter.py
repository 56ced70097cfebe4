"""The draft model: one decoder block, fed with the target's features.

At position t it reads what the target's head read there, h_t, and the token
that was chosen from it, x_{t+1}; it gives h_{t+1} as it expects it, so that the
target's head says what x_{t+2} may be. Tables, final norm and head are the
target's own and are arguments of every call: kept ones would go stale when a
policy learns.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_llm import typing
from efficient_llm.models import (
  attention,
  decoding,
  kv_cache,
  layers,
  modules,
  projection,
  transformer,
)
from efficient_llm.models import rotary as rotary_lib
from efficient_llm.models.config import TransformerConfig
from efficient_llm.speculative import drafter_form
from efficient_llm.typing import Array, Bool, Float, Int, Params

# The two things that are read at a position: a token and a feature.
_PAIR = typing.LogicalAxes(inputs=('pair', 'embed'), outputs=('embed',))


def init(
  config: TransformerConfig,
  key: Array,
  target_params: Params | None = None,
  *,
  form: drafter_form.Form = 'normed',
) -> Params:
  """Makes the drafter's parameters: an input projection and a block.

  Args:
    config: The target model.
    key: A typed random key.
    target_params: The target's; its last layer is where the block starts.
    form: Which norms it has.
  Raises:
    ValueError: If the target is not causal, or no model that this form fits.
  """
  config.validate()
  if not config.causal:
    raise ValueError(
      'model.causal=False: only a causal target can have a drafter; choose '
      'another target.'
    )
  drafter_form.check(config, form)
  fc_key, block_key = jax.random.split(key)
  kernel = layers.weight(
    nnx.Rngs(params=fc_key),
    {**config.sizes, 'pair': 2},
    inputs=_PAIR.inputs,
    outputs=_PAIR.outputs,
  )[...]
  kind, block_config = drafter_form.block(config, form)
  if target_params is None:
    block = modules.make(kind, block_config, block_key)
  else:
    last = transformer.unstack_layers(dict(target_params))['layers'][-1]
    block = drafter_form.part(last, modules.logical_axes(kind, block_config))
  return {'fc': {'kernel': kernel}, 'block': block}


def logical_axes(
  config: TransformerConfig, *, form: drafter_form.Form = 'normed'
) -> dict[str, typing.PyTree]:
  """A LogicalAxes for every parameter, in the same tree as `init`."""
  return {
    'fc': {'kernel': _PAIR},
    'block': modules.logical_axes(*drafter_form.block(config, form)),
  }


def num_params(
  config: TransformerConfig, *, form: drafter_form.Form = 'normed'
) -> int:
  """Parameters of a drafter for this target."""
  shapes = jax.eval_shape(lambda: init(config, jax.random.key(0), form=form))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def prepare(config: TransformerConfig, params: Params) -> Params:
  """As `decoding.prepare`, for the drafter's.

  Args:
    config: The target model.
    params: From `init`.
  """
  block = {'layers': (params['block'],)}
  (block,) = decoding.prepare(config, block)['layers']
  kernel = params['fc']['kernel']
  is_joined = isinstance(kernel, projection.Transposed)
  if jax.default_backend() == 'cpu' and not is_joined:
    kernel = projection.transpose([kernel], 2)
  kernel = kernel.astype(jnp.dtype(config.dtype))
  return {'fc': {'kernel': kernel}, 'block': block}


@typing.typed
def forward(
  config: TransformerConfig,
  params: Params,
  target_params: Params,
  next_tokens_BT: Int[Array, 'B T'],
  hidden_BTD: Float[Array, 'B T D'],
  *,
  positions_BT: Int[Array, 'B T'] | None = None,
  segment_ids_BT: Int[Array, 'B T'] | None = None,
  cache: kv_cache.KVCache | None = None,
  tail_mask_BTT: Bool[Array, 'B T T'] | None = None,
  num_new_B: Int[Array, 'B'] | None = None,
) -> tuple[Float[Array, 'B T D'], kv_cache.KVCache | None]:
  """Predicts the target's next features.

  `transformer.unembed(config, target_params, predicted)` at t gives the law of
  token x_{t+2}. Fed back as h_{t+1}, the prediction drafts further.

  Args:
    config: The target model.
    params: The drafter's, from `init`.
    target_params: The target's as they are now.
    next_tokens_BT: x_{t+1}, the token behind the one that h_t stands at.
    hidden_BTD: h_t, the target's `Output.hidden` or an own prediction of it.
    positions_BT: t; by default the index, counted from the cache's length.
    segment_ids_BT: Packed document of each position, 0 for padding.
    cache: Past keys and values, of one layer; the new ones are appended.
    tail_mask_BTT: With a cache, which new positions see each other (a draft
      tree); causal by default.
    num_new_B: With a cache, how many of the T of each row are real (the first
      ones); all by default. The others leave no trace.
  Returns:
    The predicted features, and the cache with the new positions counted.
  Raises:
    ValueError: If T exceeds the cache's capacity, or an input does not go with
      (or without) a cache.
  """
  num_tokens = next_tokens_BT.shape[1]
  if cache is not None and num_tokens > cache.capacity:
    raise ValueError(
      f"{num_tokens} positions exceed the drafter's cache of "
      f'{cache.capacity}; make it larger.'
    )
  if cache is None and num_new_B is not None:
    raise ValueError('num_new_B needs a cache to count in; leave it out.')
  if positions_BT is None:
    start_B1 = 0 if cache is None else cache.lengths_B[:, None]
    positions_BT = jnp.broadcast_to(
      jnp.arange(num_tokens)[None] + start_B1, next_tokens_BT.shape
    )
  mask = attention.make_mask(
    causal=True,
    num_tokens=num_tokens,
    segment_ids_BT=segment_ids_BT,
    cache=cache,
    tail_mask_BTT=tail_mask_BTT,
  )
  predicted_BTD, cache = forward_masked(
    config,
    params,
    target_params,
    next_tokens_BT,
    hidden_BTD,
    positions_BT=positions_BT,
    mask=mask,
    cache=cache,
  )
  if cache is not None:
    cache = cache.advance(num_tokens if num_new_B is None else num_new_B)
  return predicted_BTD, cache


def forward_masked(
  config: TransformerConfig,
  params: Params,
  target_params: Params,
  next_tokens_BT: Array,
  hidden_BTD: Array,
  *,
  positions_BT: Array,
  mask: attention.Mask,
  cache: kv_cache.KVCache | None,
) -> tuple[Array, kv_cache.KVCache | None]:
  """`forward` under any mask; new positions are appended but not counted."""
  block = drafter_form.bind(config, params)
  x_BTD, cache = block(
    _inputs(
      config, params, target_params, next_tokens_BT, hidden_BTD, positions_BT
    ),
    mask=mask,
    rotary=_rotary(config, positions_BT),
    cache=cache,
  )
  if drafter_form.of(params) == 'normed' and 'final_norm' in target_params:
    norm = modules.bind('norm', config, target_params['final_norm'])
    x_BTD = norm(x_BTD)
  return x_BTD, cache


def empty_cache(
  config: TransformerConfig, batch_size: int, capacity: int
) -> kv_cache.KVCache:
  """A KV cache for the drafter's one layer.

  Args:
    config: The target model.
    batch_size: Rows.
    capacity: Most positions of a row.
  """
  return kv_cache.create(
    num_layers=1,
    batch_size=batch_size,
    num_kv_heads=config.sizes['kv_heads'],
    capacity=capacity,
    head_dim=config.sizes['head_dim'],
    dtype=config.dtype,
  )


@typing.typed
def rebuild_cache(
  config: TransformerConfig,
  params: Params,
  target_params: Params,
  next_tokens_BS: Int[Array, 'B S'],
  hidden_BSD: Float[Array, 'B S D'],
  lengths_B: Int[Array, 'B'],
) -> kv_cache.KVCache:
  """Makes the cache that `forward` would have left, by matrix products alone.

  A single layer's keys and values at t depend on x_{t+1} and h_t only. So
  speculation can be switched on, or the drafter exchanged, in the middle of a
  generation without running the target or any attention again.

  Args:
    config: The target model.
    params: The drafter's.
    target_params: The target's.
    next_tokens_BS: x_{t+1} of the positions 0, 1, ... of each row.
    hidden_BSD: h_t; finite behind a row's length too.
    lengths_B: Positions that each row holds.
  Returns:
    A cache with a capacity of S positions.
  """
  batch_size, capacity = next_tokens_BS.shape
  positions_BS = jnp.broadcast_to(jnp.arange(capacity), next_tokens_BS.shape)
  x_BSD = _inputs(
    config, params, target_params, next_tokens_BS, hidden_BSD, positions_BS
  )
  block = drafter_form.bind(config, params)
  if not block.post_norm:
    x_BSD = block.attention_norm(x_BSD)
  _, k_BSKH, v_BSKH = block.attention.project(x_BSD)
  rotary = _rotary(config, positions_BS)
  if rotary is not None:
    k_BSKH = rotary_lib.rotate(k_BSKH, rotary)
  cache = empty_cache(config, batch_size, capacity)
  return cache.append(k_BSKH, v_BSKH, layer=0).advance(lengths_B)


def _inputs(
  config: TransformerConfig,
  params: Params,
  target_params: Params,
  next_tokens_BT: Array,
  hidden_BTD: Array,
  positions_BT: Array,
) -> Array:
  """What the block reads: token and feature of each position, projected."""
  embed = modules.bind('embedding', config, target_params['embedding'])
  # The token stands one further; only learned positions look at it.
  token_positions_BT = jnp.minimum(positions_BT + 1, config.max_positions - 1)
  e_BTD = embed(next_tokens_BT, token_positions_BT, None)
  if drafter_form.of(params) == 'normed':
    # Rows of the table are small beside features, which would drown them.
    square_BT1 = jnp.square(e_BTD.astype(jnp.float32)).mean(-1, keepdims=True)
    scale_BT1 = jax.lax.rsqrt(square_BT1 + config.norm_epsilon)
    e_BTD = (e_BTD * scale_BT1).astype(e_BTD.dtype)
  pair_BT2D = jnp.stack([e_BTD, hidden_BTD.astype(e_BTD.dtype)], axis=-2)
  kernel = params['fc']['kernel'].astype(e_BTD.dtype)
  return projection.project(pair_BT2D, kernel, 2)


def _rotary(
  config: TransformerConfig, positions_BT: Array
) -> tuple[Array, Array] | None:
  if config.positions != 'rotary':
    return None
  return config.rotary_tables(positions_BT)
