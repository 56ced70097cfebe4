"""The one stack: GPT-2, BERT, RoBERTa, Llama and Qwen are settings of it.

Flax NNX lives behind four functions; everybody else sees nested dicts:
`init`, `logical_axes`, `apply` and `unembed`.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_llm import sharding, typing
from efficient_llm.models import attention, kv_cache, layers
from efficient_llm.typing import Array, Bool, Float, Int, LogicalAxes, Params


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Settings of the stack; the defaults are a small Llama.

  Attributes:
    num_kv_heads: Key/value heads; all heads where None.
    head_dim: Size of a head; embed_dim / num_heads where None.
    mlp_dim: Hidden size of the MLP; 4 x embed_dim (8/3 x gated) where None.
    max_positions: Longest sequence.
    causal: Whether a token sees only its past (False: BERT).
    norm_placement: 'pre' ends with a final norm, 'post' begins with one.
    bias: Biases of the attention output and the MLP.
    qkv_bias: Biases of queries, keys and values.
    num_token_types: Rows of BERT's token-type table; 0 for none.
    mlm_head: BERT's transform (dense, activation, norm) before the output.
    head_bias: Bias on the vocabulary (BERT, RoBERTa).
    init_std: Standard deviation of all weights; by fan-in where None.
    dtype: Type of activations; weights stay float32.
    remat: What the backward pass recomputes: 'none', 'dots' (all but matrix
      products) or 'full' (every layer from its input).
    scan_unroll: Layers per iteration of the layer scan.
    attention_implementation: 'xla', 'cudnn', 'splash'; 'auto' by platform.
  """

  vocab_size: int = 320
  num_layers: int = 4
  embed_dim: int = 128
  num_heads: int = 4
  num_kv_heads: int | None = None
  head_dim: int | None = None
  mlp_dim: int | None = None
  max_positions: int = 1024
  causal: bool = True
  norm: Literal['rms', 'layer'] = 'rms'
  norm_placement: Literal['pre', 'post'] = 'pre'
  norm_epsilon: float = 1e-6
  positions: Literal['rotary', 'learned'] = 'rotary'
  rotary_base: float = 10_000.0
  activation: Literal['silu', 'gelu', 'gelu_tanh', 'relu'] = 'silu'
  gated: bool = True
  bias: bool = False
  qkv_bias: bool = False
  qk_norm: bool = False
  tie_embeddings: bool = True
  num_token_types: int = 0
  mlm_head: bool = False
  head_bias: bool = False
  init_std: float | None = None
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Literal['none', 'dots', 'full'] = 'none'
  scan_unroll: int = 1
  attention_implementation: attention.Implementation = 'auto'

  @functools.cached_property
  def sizes(self) -> dict[str, int]:
    """Length of every named axis; what `LogicalAxes` names refer to."""
    default_mlp = 4 * self.embed_dim
    if self.gated:
      default_mlp = -(-8 * self.embed_dim // 3 // 32) * 32
    return {
      'vocab': self.vocab_size,
      'embed': self.embed_dim,
      'mlp': self.mlp_dim or default_mlp,
      'heads': self.num_heads,
      'kv_heads': self.num_kv_heads or self.num_heads,
      'head_dim': self.head_dim or self.embed_dim // self.num_heads,
      'positions': self.max_positions,
      'token_types': self.num_token_types,
      'layers': self.num_layers,
    }

  @property
  def residual_scale(self) -> float:
    """Keeps a pre-norm residual stream's variance independent of depth."""
    if self.norm_placement == 'post':
      return 1.0
    return (2 * self.num_layers) ** -0.5

  def validate(self) -> None:
    """Checks rules across fields; raises ValueError with one line."""
    for name in ('vocab_size', 'num_layers', 'embed_dim', 'num_heads'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'model.{name}={getattr(self, name)} must be at least 1.'
        )
    if self.head_dim is None and self.embed_dim % self.num_heads:
      raise ValueError(
        f'model.embed_dim={self.embed_dim} must be divisible by '
        f'model.num_heads={self.num_heads}; change one or set model.head_dim.'
      )
    if self.num_heads % self.sizes['kv_heads']:
      raise ValueError(
        f'model.num_heads={self.num_heads} must be divisible by '
        f'model.num_kv_heads={self.num_kv_heads}; change one of them.'
      )
    if self.positions == 'rotary' and self.sizes['head_dim'] % 2:
      raise ValueError(
        f'Rotary positions need an even head size, got '
        f'{self.sizes["head_dim"]}; set model.head_dim.'
      )
    if self.scan_unroll < 1:
      raise ValueError(
        f'model.scan_unroll={self.scan_unroll} must be at least 1.'
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """What a forward pass gives.

  Attributes:
    logits: [B, T, V] float32, or None where not asked for.
    hidden: [B, T, D], what the head reads (after the final norm).
    cache: The KV cache with the new tokens written and counted, or None.
  """

  logits: Array | None
  hidden: Array
  cache: kv_cache.KVCache | None


class Embedding(nnx.Module):
  """Token, position and token-type tables, and the norm of post-norm models."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
    std = config.init_std or 0.02
    self.dtype = jnp.dtype(config.dtype)

    def table(rows: str) -> nnx.Param:
      return layers.weight(
        rngs, config.sizes, inputs=(rows,), outputs=('embed',), std=std
      )

    self.tokens = table('vocab')
    if config.positions == 'learned':
      self.positions = table('positions')
    if config.num_token_types:
      self.token_types = table('token_types')
    if config.norm_placement == 'post':
      self.norm = layers.Norm(config, rngs=rngs)

  def __call__(
    self, tokens_BT: Array, positions_BT: Array, types_BT: Array | None
  ) -> Array:
    x_BTD = self.tokens[...].astype(self.dtype)[tokens_BT]
    if hasattr(self, 'positions'):
      x_BTD += self.positions[...].astype(self.dtype)[positions_BT]
    if hasattr(self, 'token_types'):
      rows = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
      x_BTD += self.token_types[...].astype(self.dtype)[rows]
    if hasattr(self, 'norm'):
      x_BTD = self.norm(x_BTD)
    return sharding.constrain(x_BTD, ('batch', None, None))


class Head(nnx.Module):
  """From the hidden state to logits over the vocabulary."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
    self.dtype = jnp.dtype(config.dtype)
    self.activation = config.activation
    if config.mlm_head:
      self.transform = layers.Linear(
        config, rngs=rngs, inputs=('embed',), outputs=('embed',), bias=True
      )
      self.norm = layers.Norm(config, rngs=rngs)
    if not config.tie_embeddings:
      self.kernel = layers.weight(
        rngs,
        config.sizes,
        inputs=('embed',),
        outputs=('vocab',),
        std=config.init_std,
      )
    if config.head_bias:
      self.bias = layers.weight(
        rngs, config.sizes, outputs=('vocab',), fill=0.0
      )

  def __call__(self, hidden_BTD: Array, table_VD: Array) -> Array:
    if hasattr(self, 'transform'):
      activation = layers.ACTIVATIONS[self.activation]
      hidden_BTD = self.norm(activation(self.transform(hidden_BTD)))
    if hasattr(self, 'kernel'):
      kernel_DV = self.kernel[...]
    else:
      kernel_DV = table_VD.T
    logits = jnp.dot(
      hidden_BTD,
      kernel_DV.astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    if hasattr(self, 'bias'):
      logits += self.bias[...]
    names = (*('batch', None)[: logits.ndim - 1], 'vocab')
    return sharding.constrain(logits, names)


_MODULES = {'embedding': Embedding, 'block': layers.Block, 'head': Head}


@functools.lru_cache(maxsize=64)
def _structure(kind: str, config: TransformerConfig) -> tuple[Any, Any]:
  """NNX graph definition and logical axes of one module."""
  if kind == 'norm':
    make = functools.partial(layers.Norm, config)
  else:
    make = functools.partial(_MODULES[kind], config)
  abstract = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
  graph, state = nnx.split(abstract, nnx.Param)
  axes = jax.tree.map(
    lambda variable: variable.get_metadata()['axes'],
    state,
    is_leaf=lambda x: isinstance(x, nnx.Variable),
  )
  return graph, nnx.to_pure_dict(axes)


def _make(kind: str, config: TransformerConfig, key: Array) -> Params:
  module = layers.Norm if kind == 'norm' else _MODULES[kind]
  state = nnx.state(module(config, rngs=nnx.Rngs(params=key)), nnx.Param)
  return nnx.to_pure_dict(state)


def _module(kind: str, config: TransformerConfig, params: Params) -> Any:
  return nnx.merge(_structure(kind, config)[0], params)


def init(config: TransformerConfig, key: Array) -> Params:
  """Makes the parameters: float32, layers stacked along a leading axis.

  Args:
    config: The model.
    key: A typed random key.
  """
  config.validate()
  embedding_key, layers_key, head_key = jax.random.split(key, 3)
  make_block = functools.partial(_make, 'block', config)
  params = {
    'embedding': _make('embedding', config, embedding_key),
    'layers': jax.vmap(make_block)(
      jax.random.split(layers_key, config.num_layers)
    ),
  }
  if config.norm_placement == 'pre':
    params['final_norm'] = _make('norm', config, head_key)
  # A tied head without transform or bias has no parameters of its own.
  if head := _make('head', config, head_key):
    params['head'] = head
  return params


def logical_axes(config: TransformerConfig) -> dict[str, Any]:
  """A LogicalAxes for every parameter, in the same tree as `init`."""
  axes = {
    'embedding': _structure('embedding', config)[1],
    'layers': jax.tree.map(
      lambda leaf: leaf.stacked('layers'), _structure('block', config)[1]
    ),
  }
  if config.norm_placement == 'pre':
    axes['final_norm'] = _structure('norm', config)[1]
  if head := _structure('head', config)[1]:
    axes['head'] = head
  return axes


def abstract_params(config: TransformerConfig) -> Params:
  """Shapes and dtypes of the parameters, without making them."""
  return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def unstack_layers(params: Params) -> Params:
  """Params whose 'layers' are a tuple of single layers, for decoding loops.

  Done once before the loop; a stacked tree would be sliced at every token.
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
  tokens_BT: Int[Array, 'B T'],
  *,
  positions_BT: Int[Array, 'B T'] | None = None,
  segment_ids_BT: Int[Array, 'B T'] | None = None,
  token_types_BT: Int[Array, 'B T'] | None = None,
  cache: kv_cache.KVCache | None = None,
  tail_mask_BTT: Bool[Array, 'B T T'] | None = None,
  num_new_B: Int[Array, 'B'] | None = None,
  with_logits: bool = True,
) -> Output:
  """Runs the stack.

  Args:
    config: The model.
    params: From `init` (or `unstack_layers`).
    tokens_BT: Token ids.
    positions_BT: Position of each token; by default its index, counted from the
      cache's length where there is a cache.
    segment_ids_BT: Packed document of each token, 0 for padding.
    token_types_BT: BERT's token types.
    cache: Past keys and values; the tokens are appended to it.
    tail_mask_BTT: With a cache, which of the new tokens see each other (a draft
      tree); causal by default.
    num_new_B: With a cache, how many of the T tokens of each row are real (the
      first ones); all by default. The others leave no trace.
    with_logits: Whether to compute logits; `unembed` does it later for chosen
      positions.
  Raises:
    ValueError: If T exceeds the model's positions or the cache's capacity.
  """
  num_tokens = tokens_BT.shape[1]
  limit = config.max_positions if cache is None else cache.capacity
  if num_tokens > limit:
    raise ValueError(
      f'{num_tokens} tokens exceed the {limit} positions of the model or its '
      'cache; shorten the sequence or raise model.max_positions.'
    )
  if positions_BT is None:
    start_B1 = 0 if cache is None else cache.lengths_B[:, None]
    positions_BT = jnp.broadcast_to(
      jnp.arange(num_tokens)[None] + start_B1, tokens_BT.shape
    )
  mask = attention.Mask(
    causal=config.causal,
    segment_ids_BT=segment_ids_BT,
    allowed_BTS=None
    if cache is None
    else cache.allowed(num_tokens, tail_BTT=tail_mask_BTT),
  )
  rotary = None
  if config.positions == 'rotary':
    rotary = layers.rotary_tables(
      positions_BT,
      head_dim=config.sizes['head_dim'],
      base=config.rotary_base,
    )
  embedding = _module('embedding', config, params['embedding'])
  x_BTD = embedding(tokens_BT, positions_BT, token_types_BT)
  x_BTD, cache = _run_layers(
    config, params['layers'], x_BTD, cache, mask=mask, rotary=rotary
  )
  if cache is not None:
    cache = cache.advance(num_tokens if num_new_B is None else num_new_B)
  if 'final_norm' in params:
    x_BTD = _module('norm', config, params['final_norm'])(x_BTD)
  logits = unembed(config, params, x_BTD) if with_logits else None
  return Output(logits=logits, hidden=x_BTD, cache=cache)


def _run_layers(
  config: TransformerConfig,
  stack: Any,
  x_BTD: Array,
  cache: kv_cache.KVCache | None,
  **attention_inputs: Any,
) -> tuple[Array, kv_cache.KVCache | None]:
  """Scans the stacked layers, or loops over single ones (always with cache)."""

  def run(params: Params, x_BTD: Array, **more: Any) -> tuple[Array, Any]:
    block = _module('block', config, params)
    return block(x_BTD, **attention_inputs, **more)

  if cache is not None or isinstance(stack, tuple):
    single = unstack_layers({'layers': stack})['layers']
    for index, params in enumerate(single):
      x_BTD, cache = run(params, x_BTD, cache=cache, layer=index)
    return x_BTD, cache

  def body(x_BTD: Array, params: Params) -> tuple[Array, None]:
    return run(params, x_BTD)[0], None

  if config.remat != 'none':
    policies = jax.checkpoint_policies
    policy = {
      'full': policies.nothing_saveable,
      'dots': policies.dots_with_no_batch_dims_saveable,
    }[config.remat]
    body = jax.checkpoint(body, policy=policy, prevent_cse=False)
  unroll = min(config.scan_unroll, config.num_layers)
  return jax.lax.scan(body, x_BTD, stack, unroll=unroll)[0], None


@typing.typed
def unembed(
  config: TransformerConfig, params: Any, hidden: Float[Array, '... D']
) -> Float[Array, '... V']:
  """Logits, float32, of hidden states that `apply` returned."""
  head = _module('head', config, params.get('head', {}))
  return head(hidden, params['embedding']['tokens'])


def empty_cache(
  config: TransformerConfig, *, batch_size: int, capacity: int
) -> kv_cache.KVCache:
  """A KV cache for this model."""
  return kv_cache.create(
    num_layers=config.num_layers,
    batch_size=batch_size,
    num_kv_heads=config.sizes['kv_heads'],
    capacity=capacity,
    head_dim=config.sizes['head_dim'],
    dtype=config.dtype,
  )


def num_params(config: TransformerConfig, *, embeddings: bool = True) -> int:
  """Parameters, optionally without the tables of tokens and positions.

  An untied output matrix counts as a weight, a table that is only looked up
  does not (Kaplan et al. 2020, section 1.3, arXiv:2001.08361).
  """
  axes = jax.tree.leaves(logical_axes(config))
  sizes = config.sizes
  total = 0
  for leaf in axes:
    if leaf.inputs and leaf.inputs[0] in _LOOKED_UP and not embeddings:
      continue
    size = 1
    for name in leaf.names:
      size *= sizes[name]
    total += size
  return total


_LOOKED_UP = ('vocab', 'positions', 'token_types')


def flops_per_token(config: TransformerConfig, *, num_tokens: int) -> float:
  """Training FLOPs per token of a sequence: 6 N plus the attention products.

  N counts every matrix a token is multiplied with, the (tied) output matrix
  included. Attention adds 12 L N_heads H T, half of it where causal.

  Source: Chowdhery et al. 2022, PaLM, appendix B, arXiv:2204.02311.
  """
  sizes = config.sizes
  matrices = num_params(config, embeddings=False)
  if config.tie_embeddings:
    matrices += sizes['vocab'] * sizes['embed']
  pairs = num_tokens * (0.5 if config.causal else 1.0)
  width = sizes['heads'] * sizes['head_dim']
  return 6.0 * matrices + 12.0 * config.num_layers * width * pairs
