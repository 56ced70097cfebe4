"""Both ends of the stack: tokens to vectors, and vectors to logits."""

import math

import jax.numpy as jnp
from flax import nnx

from efficient_llm import sharding
from efficient_llm.models import layers, projection
from efficient_llm.models.config import TransformerConfig
from efficient_llm.typing import Array

# Fewer rows than this: a CPU would turn the table round to multiply with it.
_FEW_ROWS = 128


class Embedding(nnx.Module):
  """Token, position and token-type tables, and the norm of post-norm models."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
    std = config.init_std or 0.02
    self.dtype = jnp.dtype(config.dtype)
    self.position_offset = config.position_offset

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
    # Gathered before the lookup: its gradient cannot be sharded by width.
    table_VD = sharding.constrain(self.tokens[...], ('vocab', None))
    x_BTD = table_VD.astype(self.dtype)[tokens_BT]
    if hasattr(self, 'positions'):
      rows_BT = positions_BT + self.position_offset
      x_BTD += self.positions[...].astype(self.dtype)[rows_BT]
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

  def __call__(self, hidden_BTD: Array, table_VD: Array | None) -> Array:
    if hasattr(self, 'transform'):
      activation = layers.ACTIVATIONS[self.activation]
      hidden_BTD = self.norm(activation(self.transform(hidden_BTD)))
    product = {'preferred_element_type': jnp.float32}
    if table_VD is None:
      kernel_DV = self.kernel[...].astype(self.dtype)
      logits = jnp.dot(hidden_BTD, kernel_DV, **product)
    elif math.prod(hidden_BTD.shape[:-1]) < _FEW_ROWS:
      table_VD = table_VD.astype(self.dtype)
      logits = projection.by_rows(table_VD, hidden_BTD, **product)
    else:
      logits = jnp.dot(hidden_BTD, table_VD.astype(self.dtype).T, **product)
    if hasattr(self, 'bias'):
      logits += self.bias[...]
    return sharding.constrain(
      logits, ('batch', *[None] * (logits.ndim - 2), 'vocab')
    )
