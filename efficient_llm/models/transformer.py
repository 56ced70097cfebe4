"""The one stack: GPT-2, BERT, RoBERTa, Llama, Qwen, DeiT and CaiT are settings.

Flax NNX lives behind four functions; everybody else sees nested dicts:
`init`, `logical_axes`, `apply` and `unembed`.

Over 300 lines: what the stack costs is counted beside it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm import typing
from efficient_llm.models import attention, kv_cache, modules
from efficient_llm.models.config import TransformerConfig
from efficient_llm.typing import Array, Bool, Float, Int, Params, UInt8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """What a forward pass gives.

  Attributes:
    logits: [B, T, V] float32, or None where not asked for. Images have T = 1,
      the class token.
    hidden: [B, T, D], what the head reads (after the final norm).
    cache: The KV cache with the new tokens written and counted, or None.
  """

  logits: Array | None
  hidden: Array
  cache: kv_cache.KVCache | None


def init(config: TransformerConfig, key: Array) -> Params:
  """Makes the parameters: float32, layers stacked along a leading axis.

  Args:
    config: The model.
    key: A typed random key.
  Raises:
    ValueError: If the configuration breaks a rule.
  """
  config.validate()
  embedding_key, layers_key, head_key = jax.random.split(key, 3)
  params = {
    'embedding': modules.make(_embedding(config), config, embedding_key)
  }
  for name, (block, num_layers) in _stacks(config).items():
    make_block = functools.partial(modules.make, block, config)
    params[name] = jax.vmap(make_block)(
      jax.random.split(layers_key, num_layers)
    )
    layers_key = jax.random.fold_in(layers_key, num_layers)
  if config.norm_placement == 'pre':
    params['final_norm'] = modules.make('norm', config, head_key)
  # A tied head without transform or bias has no parameters of its own.
  if head := modules.make('head', config, head_key):
    params['head'] = head
  return params


def logical_axes(config: TransformerConfig) -> dict[str, Any]:
  """A LogicalAxes for every parameter, in the same tree as `init`."""
  axes = {'embedding': modules.logical_axes(_embedding(config), config)}
  for name, (block, _) in _stacks(config).items():
    axes[name] = jax.tree.map(
      lambda leaf, name=name: leaf.stacked(name),
      modules.logical_axes(block, config),
    )
  if config.norm_placement == 'pre':
    axes['final_norm'] = modules.logical_axes('norm', config)
  if head := modules.logical_axes('head', config):
    axes['head'] = head
  return axes


def _embedding(config: TransformerConfig) -> modules.Kind:
  return 'image_embedding' if config.reads_images else 'embedding'


def _stacks(config: TransformerConfig) -> dict[str, tuple[modules.Kind, int]]:
  """What is stacked along an axis of the same name: modules and how many."""
  stacks: dict[str, tuple[modules.Kind, int]] = {
    'layers': ('block', config.num_layers)
  }
  if config.class_layers:
    stacks['class_layers'] = ('class_block', config.class_layers)
  return stacks


def abstract_params(config: TransformerConfig) -> Params:
  """Shapes and dtypes of the parameters, without making them."""
  return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def unstack_layers(params: Params) -> Params:
  """Params whose 'layers' are a tuple of single layers, for decoding loops.

  Done once before the loop; a stacked tree would be sliced at every token.

  Args:
    params: From `init`; already unstacked ones come back as they are.
  """
  if isinstance(params['layers'], tuple):
    return params
  num_layers = jax.tree.leaves(params['layers'])[0].shape[0]
  single = tuple(
    jax.tree.map(lambda x, i=i: x[i], params['layers'])
    for i in range(num_layers)
  )
  return {**params, 'layers': single}


@typing.typed
def apply(
  config: TransformerConfig,
  params: Any,
  inputs: Int[Array, 'B T'] | UInt8[Array, 'B Y X C'] | Float[Array, 'B Y X C'],
  *,
  positions_BT: Int[Array, 'B T'] | None = None,
  segment_ids_BT: Int[Array, 'B T'] | None = None,
  token_types_BT: Int[Array, 'B T'] | None = None,
  cache: kv_cache.KVCache | None = None,
  tail_mask_BTT: Bool[Array, 'B T T'] | None = None,
  num_new_B: Int[Array, 'B'] | None = None,
  with_logits: bool = True,
  num_resting: int = 0,
) -> Output:
  """Runs the stack.

  Args:
    config: The model.
    params: From `init` (or `unstack_layers`); without a cache, 'layers' may be
      a `modules.LayerSource`.
    inputs: Token ids; or images, whose pixels are bytes or in their range.
    positions_BT: Position of each token; by default its index, counted from the
      cache's length where there is a cache.
    segment_ids_BT: Packed document of each token, 0 for padding.
    token_types_BT: BERT's token types; all 0 by default.
    cache: Past keys and values; the tokens are appended to it.
    tail_mask_BTT: With a cache, which of the new tokens see each other (a draft
      tree); causal by default.
    num_new_B: With a cache, how many of the T tokens of each row are real (the
      first ones); all by default. The others leave no trace.
    with_logits: Whether to compute logits; `unembed` does it later for chosen
      positions.
    num_resting: Layers at the bottom, with the tables before them, that no
      gradient reaches and none is computed for; without a cache.
  Raises:
    ValueError: If T exceeds the model's positions or the cache's capacity, or
      an input does not go with the model, or with (without) a cache.
  """
  if config.reads_images:
    more = (positions_BT, segment_ids_BT, token_types_BT, cache)
    _check_images(config, inputs, any(x is not None for x in more))
    x_BTD = _run_on_images(config, params, inputs, num_resting=num_resting)
    return _finish(config, params, x_BTD, None, with_logits=with_logits)
  tokens_BT = inputs
  if tokens_BT.ndim != 2:
    raise ValueError(
      f'A model of text takes token ids [B, T], got {tokens_BT.shape}; set '
      'model.patch_size for images.'
    )
  num_tokens = tokens_BT.shape[1]
  _check_inputs(config, num_tokens, cache, token_types_BT, num_new_B)
  if positions_BT is None:
    start_B1 = 0 if cache is None else cache.lengths_B[:, None]
    positions_BT = jnp.broadcast_to(
      jnp.arange(num_tokens)[None] + start_B1, tokens_BT.shape
    )
  mask = attention.make_mask(
    causal=config.causal,
    num_tokens=num_tokens,
    segment_ids_BT=segment_ids_BT,
    cache=cache,
    tail_mask_BTT=tail_mask_BTT,
  )
  rotary = None
  if config.positions == 'rotary':
    rotary = config.rotary_tables(positions_BT)
  embed = modules.bind('embedding', config, params['embedding'])
  x_BTD = embed(tokens_BT, positions_BT, token_types_BT)
  x_BTD, cache = _run_layers(
    config,
    params['layers'],
    x_BTD,
    cache,
    num_resting=num_resting,
    mask=mask,
    rotary=rotary,
  )
  if cache is not None:
    cache = cache.advance(num_tokens if num_new_B is None else num_new_B)
  return _finish(config, params, x_BTD, cache, with_logits=with_logits)


def _run_on_images(
  config: TransformerConfig, params: Any, images: Array, *, num_resting: int
) -> Array:
  """The class tokens [B, 1, D] behind all layers."""
  embed = modules.bind('image_embedding', config, params['embedding'])
  x_BTD, _ = _run_layers(
    config,
    params['layers'],
    embed(images),
    None,
    num_resting=num_resting,
    mask=attention.Mask(causal=False),
    rotary=None,
  )
  if not config.class_layers:
    return x_BTD[:, :1]

  def body(class_B1D: Array, part: Params) -> tuple[Array, None]:
    block = modules.bind('class_block', config, part)
    return block(class_B1D, x_BTD), None

  return jax.lax.scan(
    _with_remat(config, body),
    embed.class_tokens(x_BTD.shape[0]),
    params['class_layers'],
    unroll=min(config.scan_unroll, config.class_layers),
  )[0]


def _finish(
  config: TransformerConfig,
  params: Any,
  x_BTD: Array,
  cache: kv_cache.KVCache | None,
  *,
  with_logits: bool,
) -> Output:
  """The final norm, where there is one, and the head, where it is wanted."""
  if 'final_norm' in params:
    x_BTD = modules.bind('norm', config, params['final_norm'])(x_BTD)
  logits = unembed(config, params, x_BTD) if with_logits else None
  return Output(logits=logits, hidden=x_BTD, cache=cache)


def _check_images(
  config: TransformerConfig, inputs: Array, has_more: bool
) -> None:
  """Refuses what is not images of the model's size."""
  size = config.image_size
  wanted = (size, size, config.image_channels)
  if inputs.shape[1:] != wanted:
    raise ValueError(
      f'The model takes images {wanted}, got {inputs.shape[1:]}; resize them '
      'or set model.image_size and model.image_channels.'
    )
  if has_more:
    raise ValueError(
      'Positions, segments, token types and caches are for text; leave them '
      'out with images.'
    )


def _check_inputs(
  config: TransformerConfig,
  num_tokens: int,
  cache: kv_cache.KVCache | None,
  token_types_BT: Array | None,
  num_new_B: Array | None,
) -> None:
  """Refuses sequences that are too long, and inputs that would be ignored."""
  limit = config.max_positions
  if cache is not None:
    limit = min(limit, cache.capacity)
  if num_tokens > limit:
    raise ValueError(
      f'{num_tokens} tokens exceed the {limit} positions of the model or its '
      'cache; shorten the sequence or raise model.max_positions.'
    )
  if token_types_BT is not None and not config.num_token_types:
    raise ValueError(
      'token_types_BT needs model.num_token_types above 0; leave it out.'
    )
  if num_new_B is not None and cache is None:
    raise ValueError('num_new_B needs a cache to count in; leave it out.')


def _run_layers(
  config: TransformerConfig,
  stack: Any,
  x_BTD: Array,
  cache: kv_cache.KVCache | None,
  *,
  num_resting: int = 0,
  **attention_inputs: Any,
) -> tuple[Array, kv_cache.KVCache | None]:
  """Scans the stacked layers, or loops over single ones (always with cache)."""

  def run(params: Params, x_BTD: Array, **more: Any) -> tuple[Array, Any]:
    block = modules.bind('block', config, params)
    return block(x_BTD, **attention_inputs, **more)

  if cache is not None or isinstance(stack, tuple):
    single = unstack_layers({'layers': stack})['layers']
    for index, params in enumerate(single):
      x_BTD, cache = run(params, x_BTD, cache=cache, layer=index)
    return x_BTD, cache

  make, parts = modules.unpack_layers(stack)

  def body(x_BTD: Array, part: Any) -> tuple[Array, None]:
    return run(make(part), x_BTD)[0], None

  body = _with_remat(config, body)
  unroll = max(1, min(config.scan_unroll, config.num_layers))
  if num_resting:
    # In two, as no part of a scan is left out of the backward pass.
    below = jax.tree.map(lambda x: x[:num_resting], parts)
    parts = jax.tree.map(lambda x: x[num_resting:], parts)
    x_BTD = jax.lax.scan(body, x_BTD, below, unroll=unroll)[0]
    x_BTD = jax.lax.stop_gradient(x_BTD)
  return jax.lax.scan(body, x_BTD, parts, unroll=unroll)[0], None


def _with_remat(config: TransformerConfig, body: Any) -> Any:
  """The body of a scan, of which the backward pass recomputes its share."""
  if config.remat == 'none':
    return body
  dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  policy = dots if config.remat == 'dots' else None
  return jax.checkpoint(body, policy=policy, prevent_cse=False)


@typing.typed
def unembed(
  config: TransformerConfig, params: Any, hidden: Float[Array, '... D']
) -> Float[Array, '... V']:
  """Logits, float32, of hidden states that `apply` returned.

  Args:
    config: The model.
    params: Its parameters.
    hidden: `Output.hidden`, or the chosen positions of it.
  """
  head = modules.bind('head', config, params.get('head', {}))
  tied = params['embedding']['tokens'] if config.tie_embeddings else None
  return head(hidden, tied)


def empty_cache(
  config: TransformerConfig, *, batch_size: int, capacity: int
) -> kv_cache.KVCache:
  """A KV cache for this model, with room for `capacity` tokens a row."""
  return kv_cache.create(
    num_layers=config.num_layers,
    batch_size=batch_size,
    num_kv_heads=config.sizes['kv_heads'],
    capacity=capacity,
    head_dim=config.sizes['head_dim'],
    dtype=config.dtype,
  )


_LOOKED_UP = {'vocab', 'positions', 'token_types'}


def num_params(config: TransformerConfig, *, embeddings: bool = True) -> int:
  """Parameters, optionally without the tables of tokens and positions.

  An untied output matrix counts as a weight, a table that is only looked up
  does not (Kaplan et al. 2020, section 1.3, arXiv:2001.08361).

  Args:
    config: The model.
    embeddings: Whether the tables count.
  """
  return sum(
    math.prod(config.sizes[name] for name in leaf.names)
    for leaf in jax.tree.leaves(logical_axes(config))
    if embeddings or not _LOOKED_UP & set(leaf.inputs)
  )


def flops_per_token(
  config: TransformerConfig, *, num_tokens: int, num_resting: int = 0
) -> float:
  """Training FLOPs per token of a text: 6 N plus the attention products.

  N counts every matrix a token is multiplied with, the (tied) output matrix
  included. Attention adds 12 L N H T, half of it where causal.
  What remat repeats does not count.

  Args:
    config: The model.
    num_tokens: T, the length of a sequence.
    num_resting: Layers without a backward pass, which is two thirds.
  Source: Chowdhery et al. 2022, PaLM, appendix B, arXiv:2204.02311. Differs:
    the half of causal attention that is masked does not count.
  """
  sizes = config.sizes
  matrices = sum(
    math.prod(sizes[name] for name in leaf.names)
    for leaf in jax.tree.leaves(logical_axes(config))
    if leaf.is_matrix and not _LOOKED_UP & set(leaf.inputs)
  )
  if config.tie_embeddings:
    matrices += sizes['vocab'] * sizes['embed']
  pairs = num_tokens * (0.5 if config.causal else 1.0)
  width = sizes['heads'] * sizes['head_dim']
  flops = 6.0 * matrices + 12.0 * config.num_layers * width * pairs
  layers = logical_axes(config)['layers']
  of_layers = 6.0 * sum(
    math.prod(sizes[name] for name in leaf.names)
    for leaf in jax.tree.leaves(layers)
    if leaf.is_matrix
  )
  of_layers += 12.0 * config.num_layers * width * pairs
  return flops - 2 / 3 * of_layers * num_resting / max(config.num_layers, 1)


def flops_per_image(
  config: TransformerConfig, *, num_resting: int = 0
) -> float:
  """Training FLOPs of an image: three times those of the forward pass.

  Every matrix counts by the places it is multiplied with: a patch's by all
  patches, the head by the class token. Class layers read all places with their
  keys and values, everything else of theirs is of the class token alone; mixing
  heads is a product for every pair of places.

  Args:
    config: A model of images.
    num_resting: Layers without a backward pass, which is two thirds.
  """
  sizes, axes = config.sizes, logical_axes(config)
  # A class token has a position only where it goes through all layers.
  num_places = sizes['positions']
  width = sizes['heads'] * sizes['head_dim']

  def products(branch: Any, places: Callable[[Any], int]) -> float:
    return sum(
      math.prod(sizes[name] for name in leaf.names) * places(leaf)
      for leaf in jax.tree.leaves(branch)
      if leaf.is_matrix and not _LOOKED_UP & set(leaf.inputs)
    )

  def of_layer(leaf: typing.LogicalAxes) -> int:
    is_mix = leaf.inputs == leaf.outputs == ('heads',)
    return num_places**2 if is_mix else num_places

  def of_class_layer(leaf: typing.LogicalAxes) -> int:
    return num_places + 1 if 'kv_heads' in leaf.outputs else 1

  in_layers = products(axes['layers'], of_layer)
  in_layers += 2 * config.num_layers * width * num_places**2
  others = products(axes['embedding'], lambda _: config.num_patches)
  others += products(axes['head'], lambda _: 1)
  if config.class_layers:
    others += products(axes['class_layers'], of_class_layer)
    others += 2 * config.class_layers * width * (num_places + 1)
  rest = 1 - 2 / 3 * num_resting / max(config.num_layers, 1)
  return 6.0 * (in_layers * rest + others)
