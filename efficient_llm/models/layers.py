"""Parts of the one stack's layers: norms, matrices, attention.

Flax NNX modules that hold float32 weights and compute in the configured dtype.
Every weight carries its LogicalAxes as variable metadata.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_llm import sharding, typing
from efficient_llm.models import attention, kv_cache, projection
from efficient_llm.models import rotary as rotary_lib

ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'relu': jax.nn.relu,
}


def weight(
  rngs: nnx.Rngs,
  sizes: dict[str, int],
  *,
  inputs: tuple[str, ...] = (),
  outputs: tuple[str, ...] = (),
  std: float | None = None,
  fill: float | None = None,
) -> nnx.Param:
  """A float32 parameter with its named axes.

  Args:
    rngs: Source of randomness.
    sizes: Length of every named axis of the model.
    inputs: Names of the axes that are summed over.
    outputs: Names of the axes that are produced.
    std: Standard deviation of the normal distribution that is cut off at three
      of them (which takes 1.3 % off it); 1 / sqrt(inputs' size) by default.
    fill: A constant instead of a random start.
  """
  axes = typing.LogicalAxes(inputs=inputs, outputs=outputs)
  shape = tuple(sizes[name] for name in axes.names)
  if fill is not None:
    return nnx.Param(jnp.full(shape, fill, jnp.float32), axes=axes)
  fan_in = math.prod(sizes[name] for name in inputs)
  value = (std or fan_in**-0.5) * jax.random.truncated_normal(
    rngs.params(), -3.0, 3.0, shape, jnp.float32
  )
  return nnx.Param(value, axes=axes)


class Norm(nnx.Module):
  """RMSNorm or LayerNorm over the last axis, statistics in float32."""

  def __init__(
    self, config: Any, *, rngs: nnx.Rngs, axis: str = 'embed'
  ) -> None:
    self.epsilon = config.norm_epsilon
    self.centered = config.norm == 'layer'
    self.dtype = jnp.dtype(config.dtype)
    self.scale = weight(rngs, config.sizes, outputs=(axis,), fill=1.0)
    if self.centered:
      self.bias = weight(rngs, config.sizes, outputs=(axis,), fill=0.0)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    if self.centered:
      x -= x.mean(-1, keepdims=True)
    variance = jnp.square(x).mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
    if self.centered:
      x += self.bias[...]
    return x.astype(self.dtype)


class Linear(nnx.Module):
  """Matrix product over named axes, with an optional bias."""

  def __init__(
    self,
    config: Any,
    *,
    rngs: nnx.Rngs,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    bias: bool,
    scale: float = 1.0,
  ) -> None:
    self.num_inputs = len(inputs)
    self.output_sizes = tuple(config.sizes[name] for name in outputs)
    self.dtype = jnp.dtype(config.dtype)
    fan_in = math.prod(config.sizes[name] for name in inputs)
    std = scale * (config.init_std or fan_in**-0.5)
    self.kernel = weight(
      rngs, config.sizes, inputs=inputs, outputs=outputs, std=std
    )
    if bias:
      self.bias = weight(rngs, config.sizes, outputs=outputs, fill=0.0)

  def __call__(self, x: jax.Array) -> jax.Array:
    return project_all(x, self)[0]


def project_all(x: jax.Array, *linears: Linear) -> tuple[jax.Array, ...]:
  """What each of them makes of `x`; one product for all where joined."""
  leading = x.shape[: x.ndim - linears[0].num_inputs]
  kernels = [
    linear.kernel.get_value().astype(linear.dtype) for linear in linears
  ]
  if isinstance(kernels[0], projection.Transposed):
    y = projection.project(x, kernels[0], linears[0].num_inputs)
    ends = np.cumsum([math.prod(linear.output_sizes) for linear in linears])
    products = jnp.split(y, ends[:-1], axis=-1)
  else:
    products = [
      projection.project(x, kernel, linear.num_inputs)
      for linear, kernel in zip(linears, kernels, strict=True)
    ]
  outputs = []
  for linear, product in zip(linears, products, strict=True):
    y = product.reshape(*leading, *linear.output_sizes)
    if hasattr(linear, 'bias'):
      y += linear.bias[...].astype(linear.dtype)
    outputs.append(y)
  return tuple(outputs)


class Mix(nnx.Module):
  """Linear over heads, of what every head has for every pair of places."""

  def __init__(self, config: Any, *, rngs: nnx.Rngs) -> None:
    heads = ('heads',)
    self.kernel = weight(
      rngs, config.sizes, inputs=heads, outputs=heads, std=config.init_std
    )
    self.bias = weight(rngs, config.sizes, outputs=heads, fill=0.0)

  def __call__(self, x_BNTS: jax.Array) -> jax.Array:
    kernel_NM = self.kernel[...].astype(x_BNTS.dtype)
    mixed_BMTS = jnp.einsum('BNTS,NM->BMTS', x_BNTS, kernel_NM)
    return mixed_BMTS + self.bias[...].astype(x_BNTS.dtype)[:, None, None]


class Attention(nnx.Module):
  """Multi-head attention with grouped key/value heads."""

  def __init__(self, config: Any, *, rngs: nnx.Rngs) -> None:
    self.implementation = config.attention_implementation
    self.qk_norm = config.qk_norm
    embed, head = ('embed',), ('heads', 'head_dim')
    kv_head = ('kv_heads', 'head_dim')

    def project(outputs: tuple[str, ...]) -> Linear:
      return Linear(
        config,
        rngs=rngs,
        inputs=embed,
        outputs=outputs,
        bias=config.qkv_bias,
      )

    self.query, self.key = project(head), project(kv_head)
    self.value = project(kv_head)
    self.out = Linear(
      config,
      rngs=rngs,
      inputs=head,
      outputs=embed,
      bias=config.bias,
      scale=config.residual_scale,
    )
    if self.qk_norm:
      self.query_norm = Norm(config, rngs=rngs, axis='head_dim')
      self.key_norm = Norm(config, rngs=rngs, axis='head_dim')
    if config.talking_heads:
      self.mix_logits = Mix(config, rngs=rngs)
      self.mix_weights = Mix(config, rngs=rngs)

  def __call__(
    self,
    x_BTD: jax.Array,
    *,
    mask: attention.Mask,
    rotary: tuple[jax.Array, jax.Array] | None,
    cache: kv_cache.KVCache | None = None,
    layer: int = 0,
  ) -> tuple[jax.Array, kv_cache.KVCache | None]:
    q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD)
    if rotary is not None:
      q_BTNH = rotary_lib.rotate(q_BTNH, rotary)
      k_BTKH = rotary_lib.rotate(k_BTKH, rotary)
    q_BTNH = sharding.constrain(q_BTNH, ('batch', None, 'heads', None))
    k_BTKH = sharding.constrain(k_BTKH, ('batch', None, 'kv_heads', None))
    if cache is not None:
      cache = cache.append(k_BTKH, v_BTKH, layer=layer)
      k_BTKH, v_BTKH = cache.layer(layer)
    if hasattr(self, 'mix_logits'):
      y_BTNH = attention.talk(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mix_logits=self.mix_logits,
        mix_weights=self.mix_weights,
      )
    else:
      y_BTNH = attention.attend(
        q_BTNH, k_BTKH, v_BTKH, mask=mask, implementation=self.implementation
      )
    return self.out(y_BTNH), cache

  def read(self, x_BTD: jax.Array, source_BSD: jax.Array) -> jax.Array:
    """What places read of others, all of them; heads are not mixed.

    Args:
      x_BTD: Who asks.
      source_BSD: Who is asked.
    """
    (q_BTNH,) = project_all(x_BTD, self.query)
    k_BSKH, v_BSKH = project_all(source_BSD, self.key, self.value)
    if self.qk_norm:
      q_BTNH, k_BSKH = self.query_norm(q_BTNH), self.key_norm(k_BSKH)
    y_BTNH = attention.attend(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      mask=attention.Mask(causal=False),
      implementation='xla',
    )
    return self.out(y_BTNH)

  def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, positions not yet applied."""
    q_BTNH, k_BTKH, v_BTKH = project_all(
      x_BTD, self.query, self.key, self.value
    )
    if self.qk_norm:
      q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
    return q_BTNH, k_BTKH, v_BTKH
