"""Tiny models of every architecture, and compiled forward passes of them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm.models import transformer

_BASE = transformer.TransformerConfig(
  vocab_size=37,
  num_layers=2,
  embed_dim=16,
  num_heads=4,
  mlp_dim=24,
  max_positions=32,
  # Large weights, so that attention is far from uniform.
  init_std=0.3,
)
_GPT2 = dataclasses.replace(
  _BASE,
  norm='layer',
  norm_epsilon=1e-5,
  positions='learned',
  activation='gelu_tanh',
  gated=False,
  bias=True,
  qkv_bias=True,
)
_ROBERTA = dataclasses.replace(
  _GPT2,
  causal=False,
  norm_placement='post',
  activation='gelu',
  mlm_head=True,
  head_bias=True,
)
ARCHITECTURES = {
  'llama': dataclasses.replace(_BASE, num_kv_heads=2, tie_embeddings=False),
  'qwen': dataclasses.replace(
    _BASE, num_kv_heads=1, head_dim=6, qkv_bias=True, qk_norm=True
  ),
  'gpt2': _GPT2,
  'bert': dataclasses.replace(_ROBERTA, num_token_types=2),
  'roberta': _ROBERTA,
}
# Images of nine patches; a gain and mixed heads that can be seen.
_DEIT = dataclasses.replace(
  _GPT2,
  vocab_size=7,
  causal=False,
  norm_epsilon=1e-6,
  activation='gelu',
  tie_embeddings=False,
  head_bias=True,
  max_positions=1024,
  patch_size=2,
  image_size=6,
)
IMAGE_MODELS = {
  'deit': _DEIT,
  'cait': dataclasses.replace(
    _DEIT, class_layers=2, layer_scale=0.1, talking_heads=True
  ),
}
ALL = {**ARCHITECTURES, **IMAGE_MODELS}
DECODERS = ('llama', 'qwen', 'gpt2')


@functools.cache
def params(name: str) -> Any:
  """Random parameters, norms and biases too: none is just 1 or 0."""
  rng = np.random.default_rng(0)

  def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    is_scale = path[-1].key == 'scale'
    is_matrix = path[-1].key not in ('scale', 'bias')
    value = rng.normal(scale=0.3 if is_matrix else 0.1, size=leaf.shape)
    return jnp.asarray(value + is_scale, np.float32)

  abstract = transformer.abstract_params(ALL[name])
  # The first caller may be tracing, and its tracers must not be kept.
  with jax.ensure_compile_time_eval():
    return jax.tree_util.tree_map_with_path(draw, abstract)


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
  """Random token ids."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, _BASE.vocab_size, shape, np.int32)


def images(batch_size: int, *, size: int = 6, seed: int = 0) -> np.ndarray:
  """Random images of three colours."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (batch_size, size, size, 3), np.uint8)


def inputs(name: str, batch_size: int) -> np.ndarray:
  """What an architecture takes: images, or nine tokens a row."""
  is_image = name in IMAGE_MODELS
  return images(batch_size) if is_image else tokens(batch_size, 9)


@functools.partial(jax.jit, static_argnames='config')
def forward(
  config: transformer.TransformerConfig,
  params: Any,
  inputs: Any,
  **more: Any,
) -> transformer.Output:
  """`transformer.apply`, compiled once for all tests of a shape."""
  return transformer.apply(config, params, inputs, **more)


@functools.partial(jax.jit, static_argnames='config')
def _gradient(
  config: transformer.TransformerConfig,
  params: Any,
  tokens_BT: Any,
  weights_T: Any,
  inputs: Any,
) -> jax.Array:
  def project(table_VD: jax.Array) -> jax.Array:
    embedding = {**params['embedding'], 'tokens': table_VD}
    hidden_BTD = transformer.apply(
      config,
      {**params, 'embedding': embedding},
      tokens_BT,
      with_logits=False,
      **inputs,
    ).hidden
    # Norms make a plain sum over D constant.
    return weights_T @ hidden_BTD[0] @ jnp.arange(1.0, 1 + config.embed_dim)

  gradient_VD = jax.grad(project)(params['embedding']['tokens'])
  return abs(gradient_VD[tokens_BT[0]]).max(-1)


def influence(name: str, num_tokens: int, **inputs: Any) -> np.ndarray:
  """[T, T] largest gradient of the hidden state t by the embedding of token s.

  All tokens differ, so that a row of the table stands for one place.
  """
  tokens_BT = np.arange(num_tokens, dtype=np.int32)[None]
  config = ARCHITECTURES[name]
  rows = [
    _gradient(config, params(name), tokens_BT, weights_T, inputs)
    for weights_T in np.eye(num_tokens, dtype=np.float32)
  ]
  return np.stack(rows)
