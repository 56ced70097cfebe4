"""What only models of images have: patches, a class token, class attention.

DeiT is the plain vision transformer: the class token stands before the patches
in all layers. CaiT has patches alone in its layers, with gains (LayerScale) and
heads that are mixed (both settings of the usual block), and behind them layers
in which the class token alone reads and is written. Stochastic depth, which
both papers train with, and DeiT's distillation token are left out.
Source: Dosovitskiy et al. 2021, arXiv:2010.11929; Touvron et al. 2021, DeiT,
arXiv:2012.12877, and CaiT, arXiv:2103.17239.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_llm import sharding
from efficient_llm.models import block, layers

# Mean and deviation of each colour, of numbers from 0 to 1.
NORMS = {
  'symmetric': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
  'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# Middle and half range of a byte.
_MIDDLE = 127.5


class Embedding(nnx.Module):
  """Patches to vectors, their positions, and the class token."""

  def __init__(self, config: Any, *, rngs: nnx.Rngs) -> None:
    std = config.init_std or 0.02
    self.dtype = jnp.dtype(config.dtype)
    self.patch_size = config.patch_size
    self.image_norm = config.image_norm
    self.is_class_first = not config.class_layers
    self.patches = layers.Linear(
      config, rngs=rngs, inputs=('pixels',), outputs=('embed',), bias=True
    )
    self.positions = layers.weight(
      rngs,
      config.sizes,
      inputs=('positions',),
      outputs=('embed',),
      std=std,
    )
    self.class_token = layers.weight(
      rngs, config.sizes, outputs=('embed',), std=std
    )

  def __call__(self, images_BYXC: jax.Array) -> jax.Array:
    """Patches row by row, behind the class token where that comes first.

    Args:
      images_BYXC: Bytes, or numbers of that range.
    """
    pixels = images_BYXC.astype(self.dtype) / _MIDDLE - 1
    if self.image_norm != 'symmetric':
      mean_C, deviation_C = (
        jnp.asarray(x, self.dtype) for x in NORMS[self.image_norm]
      )
      pixels = ((pixels + 1) / 2 - mean_C) / deviation_C
    batch, height, width, channels = pixels.shape
    side = self.patch_size
    pixels = pixels.reshape(
      batch, height // side, side, width // side, side, channels
    )
    pixels = pixels.swapaxes(2, 3).reshape(
      batch, (height // side) * (width // side), -1
    )
    x_BTD = self.patches(pixels)
    if self.is_class_first:
      x_BTD = jnp.concatenate([self.class_tokens(batch), x_BTD], axis=1)
    x_BTD += self.positions[...].astype(self.dtype)
    return sharding.constrain(x_BTD, ('batch', None, None))

  def class_tokens(self, batch_size: int) -> jax.Array:
    """The class token of each image, [B, 1, D].

    Args:
      batch_size: B.
    """
    token_D = self.class_token[...].astype(self.dtype)
    return jnp.broadcast_to(token_D, (batch_size, 1, *token_D.shape))


class ClassBlock(block.Block):
  """A layer that only the class token goes through; patches are read.

  Source: Touvron et al. 2021, equations 5 to 8, arXiv:2103.17239.
  """

  def __init__(self, config: Any, *, rngs: nnx.Rngs) -> None:
    # One query leaves heads nothing to talk about.
    super().__init__(
      dataclasses.replace(config, talking_heads=False), rngs=rngs
    )

  def __call__(self, class_B1D: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """The class token behind the layer.

    Args:
      class_B1D: The class token before it.
      x_BTD: The patches behind the last of the other layers.
    """
    h_BSD = self.attention_norm(jnp.concatenate([class_B1D, x_BTD], axis=1))
    h_B1D = self.attention.read(h_BSD[:, :1], h_BSD)
    class_B1D = self.add_attended(class_B1D, h_B1D)
    return self.add_mlp(class_B1D, self.mlp_norm(class_B1D))
