"""One layer of the stack: attention and MLP, each with norm and residual."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_llm import sharding
from efficient_llm.models import kv_cache, layers


class Gain(nnx.Module):
  """LayerScale: a learned factor for each place of the residual stream.

  Source: Touvron et al. 2021, CaiT, equation 4, arXiv:2103.17239.
  """

  def __init__(self, config: Any, *, rngs: nnx.Rngs) -> None:
    self.dtype = jnp.dtype(config.dtype)
    self.scale = layers.weight(
      rngs, config.sizes, outputs=('embed',), fill=config.layer_scale
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    return x * self.scale[...].astype(self.dtype)


class MLP(nnx.Module):
  """Two matrices and an activation, optionally gated (GLU)."""

  def __init__(self, config: Any, *, rngs: nnx.Rngs) -> None:
    self.activation = config.activation

    def expand() -> layers.Linear:
      return layers.Linear(
        config,
        rngs=rngs,
        inputs=('embed',),
        outputs=('mlp',),
        bias=config.bias,
      )

    self.up = expand()
    if config.gated:
      self.gate = expand()
    self.down = layers.Linear(
      config,
      rngs=rngs,
      inputs=('mlp',),
      outputs=('embed',),
      bias=config.bias,
      scale=config.residual_scale,
    )

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    activation = layers.ACTIVATIONS[self.activation]
    if hasattr(self, 'gate'):
      up_BTF, gate_BTF = layers.project_all(x_BTD, self.up, self.gate)
      hidden_BTF = activation(gate_BTF) * up_BTF
    else:
      hidden_BTF = activation(self.up(x_BTD))
    hidden_BTF = sharding.constrain(hidden_BTF, ('batch', None, 'mlp'))
    return self.down(hidden_BTF)


class Block(nnx.Module):
  """One layer: attention and MLP, each with its norm and residual."""

  def __init__(self, config: Any, *, rngs: nnx.Rngs) -> None:
    self.post_norm = config.norm_placement == 'post'
    self.attention_norm = layers.Norm(config, rngs=rngs)
    self.attention = layers.Attention(config, rngs=rngs)
    self.mlp_norm = layers.Norm(config, rngs=rngs)
    self.mlp = MLP(config, rngs=rngs)
    if config.layer_scale is not None:
      self.attention_gain = Gain(config, rngs=rngs)
      self.mlp_gain = Gain(config, rngs=rngs)

  def __call__(
    self, x_BTD: jax.Array, **attention_inputs: Any
  ) -> tuple[jax.Array, kv_cache.KVCache | None]:
    h_BTD = x_BTD if self.post_norm else self.attention_norm(x_BTD)
    h_BTD, cache = self.attention(h_BTD, **attention_inputs)
    x_BTD = self.add_attended(x_BTD, h_BTD)
    if self.post_norm:
      x_BTD = self.attention_norm(x_BTD)
      return self.mlp_norm(self.add_mlp(x_BTD, x_BTD)), cache
    x_BTD = self.add_mlp(x_BTD, self.mlp_norm(x_BTD))
    return sharding.constrain(x_BTD, ('batch', None, None)), cache

  def add_attended(self, x_BTD: jax.Array, h_BTD: jax.Array) -> jax.Array:
    """The residual stream with what attention gave."""
    if hasattr(self, 'attention_gain'):
      h_BTD = self.attention_gain(h_BTD)
    return x_BTD + h_BTD

  def add_mlp(self, x_BTD: jax.Array, h_BTD: jax.Array) -> jax.Array:
    """The residual stream with what the MLP makes of its input."""
    h_BTD = self.mlp(h_BTD)
    if hasattr(self, 'mlp_gain'):
      h_BTD = self.mlp_gain(h_BTD)
    return x_BTD + h_BTD


class BareBlock(Block):
  """A layer whose attention reads its input as it is (EAGLE's drafter)."""

  def __init__(self, config: Any, *, rngs: nnx.Rngs) -> None:
    super().__init__(config, rngs=rngs)
    del self.attention_norm
    self.attention_norm = _as_it_is


def _as_it_is(x_BTD: jax.Array) -> jax.Array:
  return x_BTD
