"""Settings of the one stack, and the length of every named axis."""

import dataclasses
import functools
from typing import Literal

import jax

from efficient_llm import typing
from efficient_llm.models import attention, rotary

_DEFAULT_POSITIONS = 1024


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Settings of the stack; the defaults are a small Llama.

  With `patch_size` the model reads images: patches stand in place of tokens and
  classes in place of the vocabulary.

  Attributes:
    num_layers: 0 leaves tables, final norm and head, where training begins that
      adds the layers later.
    num_kv_heads: Key/value heads; all heads where None.
    head_dim: Size of a head, embed_dim / num_heads where None.
    mlp_dim: Hidden size of the MLP; 4 x embed_dim (8/3 x gated) where None.
    max_positions: Longest sequence; rows of the table of learned positions.
      Images have a position for each patch instead.
    position_offset: Unused rows that this table begins with (RoBERTa: 2).
    causal: Whether a token sees only its past (False: BERT).
    norm_placement: 'pre' ends with a final norm, 'post' begins with one.
    rotary_factor: Stretches rotary positions as in Llama 3.1; None does not.
      The settings behind it are of `rotary.Scaling`.
    bias: Biases of the attention output and the MLP.
    qkv_bias: Biases of queries, keys and values.
    num_token_types: Rows of BERT's token-type table; 0 for none.
    mlm_head: BERT's transform (dense, activation, norm) before the output.
    head_bias: Bias on the vocabulary (BERT, RoBERTa).
    init_std: Standard deviation of all weights; where None 0.02 for tables and
      1 / sqrt(fan-in) for matrices. What a pre-norm layer adds to its residual
      stream starts smaller by `residual_scale`, but not in models of images.
    dtype: Type of activations; weights stay float32.
    remat: What the backward pass recomputes: 'none', 'dots' (all but matrix
      products) or 'full' (every layer from its input).
    scan_unroll: Layers per iteration of the layer scan.
    attention_implementation: 'xla', 'cudnn' ('cudnn_mapped' for islands on one
      device), 'splash', 'pallas_tpu', 'pallas_gpu'; 'auto' by platform.
    patch_size: Pixels along the side of a square patch; None for text.
    image_size: Pixels along the side of a square image.
    image_channels: Colours of a pixel.
    image_norm: What becomes of bytes: 'symmetric' from -1 to 1, 'imagenet' less
      the mean of that data's colours, by their deviation.
    class_layers: Layers behind the others in which a class token alone reads
      the patches (CaiT); 0 puts it before the first patch (ViT, DeiT).
    layer_scale: Where the gains begin with which a layer's outputs are
      multiplied before they are added; None for no gains.
    talking_heads: Whether heads are mixed before and after the softmax.
  """

  vocab_size: int = 320
  num_layers: int = 4
  embed_dim: int = 128
  num_heads: int = 4
  num_kv_heads: int | None = None
  head_dim: int | None = None
  mlp_dim: int | None = None
  max_positions: int = _DEFAULT_POSITIONS
  position_offset: int = 0
  causal: bool = True
  norm: Literal['rms', 'layer'] = 'rms'
  norm_placement: Literal['pre', 'post'] = 'pre'
  norm_epsilon: float = 1e-6
  positions: Literal['rotary', 'learned'] = 'rotary'
  rotary_base: float = 10_000.0
  rotary_factor: float | None = None
  rotary_low_factor: float = 1.0
  rotary_high_factor: float = 4.0
  rotary_original_positions: int = 8192
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
  patch_size: int | None = None
  image_size: int | None = None
  image_channels: int = 3
  image_norm: Literal['symmetric', 'imagenet'] = 'symmetric'
  class_layers: int = 0
  layer_scale: float | None = None
  talking_heads: bool = False

  @property
  def reads_images(self) -> bool:
    """Whether inputs are images, and outputs their classes."""
    return self.patch_size is not None

  @property
  def num_patches(self) -> int:
    """Patches of an image; 0 for text."""
    if self.patch_size is None or self.image_size is None:
      return 0
    return (self.image_size // self.patch_size) ** 2

  @functools.cached_property
  def sizes(self) -> dict[str, int]:
    """Length of every named axis; what `LogicalAxes` names refer to."""
    default_mlp = 4 * self.embed_dim
    if self.gated:
      default_mlp = -(-8 * self.embed_dim // 3 // 32) * 32
    sizes = {
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
    if self.patch_size is None:
      return sizes
    return sizes | {
      'pixels': self.patch_size**2 * self.image_channels,
      # A class token before the patches has a position too.
      'positions': self.num_patches + (not self.class_layers),
      'class_layers': self.class_layers,
    }

  def rotary_tables(
    self, positions_BT: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Of `rotary.tables`, for models with such positions.

    Args:
      positions_BT: Position of each token.
    """
    scaling = None
    if self.rotary_factor is not None:
      scaling = rotary.Scaling(
        self.rotary_factor,
        self.rotary_low_factor,
        self.rotary_high_factor,
        self.rotary_original_positions,
      )
    return rotary.tables(
      positions_BT,
      head_dim=self.sizes['head_dim'],
      base=self.rotary_base,
      scaling=scaling,
    )

  @property
  def residual_scale(self) -> float:
    """Keeps a pre-norm residual stream's variance independent of depth."""
    if self.norm_placement == 'post' or self.reads_images:
      return 1.0
    return (2 * max(self.num_layers, 1)) ** -0.5

  def validate(self) -> None:
    typing.check_choices(self, name='model')
    for name in _COUNTS:
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'model.{name}={value} must be at least 1.')
    for name in _POSITIVE:
      value = getattr(self, name)
      if value is not None and not 0 < value < float('inf'):
        raise ValueError(f'model.{name}={value} must be positive.')
    for name in (
      'num_layers',
      'num_token_types',
      'class_layers',
      'position_offset',
    ):
      if getattr(self, name) < 0:
        raise ValueError(
          f'model.{name}={getattr(self, name)} must be 0 or more.'
        )
    self._check_kind()
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
    if self.rotary_low_factor >= self.rotary_high_factor:
      raise ValueError(
        f'model.rotary_low_factor={self.rotary_low_factor} must be below '
        f'model.rotary_high_factor={self.rotary_high_factor}; change one.'
      )
    if self.rotary_factor is not None and self.positions != 'rotary':
      raise ValueError(
        f'model.rotary_factor={self.rotary_factor} needs '
        "model.positions='rotary'; leave it out."
      )
    if self.positions == 'rotary' and self.sizes['head_dim'] % 2:
      raise ValueError(
        f'Rotary positions need an even head size, got '
        f'{self.sizes["head_dim"]}; set model.head_dim.'
      )

  def _check_kind(self) -> None:
    """Refuses settings of text in a model of images, and the other way."""
    if self.patch_size is None:
      for name, default in _OF_IMAGES.items():
        if getattr(self, name) != default:
          raise ValueError(
            f'model.{name}={getattr(self, name)} is for images, which need '
            'model.patch_size; set that, or leave it out.'
          )
      return
    if self.image_size is None or self.image_size % self.patch_size:
      raise ValueError(
        f'model.image_size={self.image_size} must be divisible by '
        f'model.patch_size={self.patch_size}; change one of them.'
      )
    if self.image_norm == 'imagenet' and self.image_channels != 3:
      raise ValueError(
        f"model.image_norm='imagenet' is of 3 colours, model.image_channels="
        f"{self.image_channels} has others; set 'symmetric'."
      )
    for name, wanted in _WITH_IMAGES.items():
      if getattr(self, name) != wanted:
        raise ValueError(
          f'model.{name}={getattr(self, name)} is for text; with '
          f'model.patch_size={self.patch_size} set it to {wanted}.'
        )
    if self.max_positions != _DEFAULT_POSITIONS:
      raise ValueError(
        f'model.max_positions={self.max_positions} is for text; images have a '
        'position for each patch, so leave it out.'
      )


# What only images have, and what it is for text.
_OF_IMAGES = {
  'image_size': None,
  'image_channels': 3,
  'image_norm': 'symmetric',
  'class_layers': 0,
  # Masked weights would come back when heads are mixed after the softmax.
  'talking_heads': False,
}
# What images need of the settings of text.
_WITH_IMAGES = {
  'causal': False,
  'norm_placement': 'pre',
  'positions': 'learned',
  'tie_embeddings': False,
  'num_token_types': 0,
  'mlm_head': False,
}
_POSITIVE = (
  'norm_epsilon',
  'rotary_base',
  'rotary_factor',
  'rotary_low_factor',
  'rotary_high_factor',
  'init_std',
  'layer_scale',
)
_COUNTS = (
  'vocab_size',
  'embed_dim',
  'num_heads',
  'num_kv_heads',
  'head_dim',
  'mlp_dim',
  'max_positions',
  'rotary_original_positions',
  'scan_unroll',
  'patch_size',
  'image_size',
  'image_channels',
)
