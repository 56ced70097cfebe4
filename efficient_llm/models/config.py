"""Settings of the one stack, and the length of every named axis."""

import dataclasses
import functools
from typing import Literal

from efficient_llm import typing
from efficient_llm.models import attention


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Settings of the stack; the defaults are a small Llama.

  Attributes:
    num_layers: 0 leaves tables, final norm and head, where training begins that
      adds the layers later.
    num_kv_heads: Key/value heads; all heads where None.
    head_dim: Size of a head, embed_dim / num_heads where None.
    mlp_dim: Hidden size of the MLP; 4 x embed_dim (8/3 x gated) where None.
    max_positions: Longest sequence; rows of the table of learned positions.
    position_offset: Unused rows that this table begins with (RoBERTa: 2).
    causal: Whether a token sees only its past (False: BERT).
    norm_placement: 'pre' ends with a final norm, 'post' begins with one.
    bias: Biases of the attention output and the MLP.
    qkv_bias: Biases of queries, keys and values.
    num_token_types: Rows of BERT's token-type table; 0 for none.
    mlm_head: BERT's transform (dense, activation, norm) before the output.
    head_bias: Bias on the vocabulary (BERT, RoBERTa).
    init_std: Standard deviation of all weights; where None 0.02 for tables and
      1 / sqrt(fan-in) for matrices. What a pre-norm layer adds to its residual
      stream starts smaller by `residual_scale`.
    dtype: Type of activations; weights stay float32.
    remat: What the backward pass recomputes: 'none', 'dots' (all but matrix
      products) or 'full' (every layer from its input).
    scan_unroll: Layers per iteration of the layer scan.
    attention_implementation: 'xla', 'cudnn', 'splash', 'pallas_tpu',
      'pallas_gpu'; 'auto' by platform.
  """

  vocab_size: int = 320
  num_layers: int = 4
  embed_dim: int = 128
  num_heads: int = 4
  num_kv_heads: int | None = None
  head_dim: int | None = None
  mlp_dim: int | None = None
  max_positions: int = 1024
  position_offset: int = 0
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
      'positions': self.max_positions + self.position_offset,
      'token_types': self.num_token_types,
      'layers': self.num_layers,
    }

  @property
  def residual_scale(self) -> float:
    """Keeps a pre-norm residual stream's variance independent of depth."""
    if self.norm_placement == 'post':
      return 1.0
    return (2 * max(self.num_layers, 1)) ** -0.5

  def validate(self) -> None:
    typing.check_choices(self, name='model')
    for name in _COUNTS:
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'model.{name}={value} must be at least 1.')
    for name in ('norm_epsilon', 'rotary_base', 'init_std'):
      value = getattr(self, name)
      if value is not None and not 0 < value < float('inf'):
        raise ValueError(f'model.{name}={value} must be positive.')
    for name in ('num_layers', 'num_token_types', 'position_offset'):
      if getattr(self, name) < 0:
        raise ValueError(
          f'model.{name}={getattr(self, name)} must be 0 or more.'
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
    if self.position_offset and self.positions != 'learned':
      raise ValueError(
        f'model.position_offset={self.position_offset} needs '
        "model.positions='learned'; leave it out."
      )
    if self.positions == 'rotary' and self.sizes['head_dim'] % 2:
      raise ValueError(
        f'Rotary positions need an even head size, got '
        f'{self.sizes["head_dim"]}; set model.head_dim.'
      )


_COUNTS = (
  'vocab_size',
  'embed_dim',
  'num_heads',
  'num_kv_heads',
  'head_dim',
  'mlp_dim',
  'max_positions',
  'scan_unroll',
)
