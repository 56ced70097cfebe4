"""The stack against plain numpy in float64, one head and token at a time."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import rotary, transformer
from tests.models import architectures

_TOKENS = architectures.tokens(2, 6)


def _norm(
  config: transformer.TransformerConfig, params: Any, x: np.ndarray
) -> np.ndarray:
  if config.norm == 'layer':
    x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)
  return x * params['scale'] + params.get('bias', 0.0)


def _activate(name: str, x: np.ndarray) -> np.ndarray:
  if name == 'silu':
    return x / (1 + np.exp(-x))
  if name == 'gelu':
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return x * (1 + np.tanh(inner)) / 2


def _rotate(x_TH: np.ndarray, base: float) -> np.ndarray:
  """Turns the pairs (i, i + H/2) as complex numbers."""
  num_tokens, size = x_TH.shape
  half = size // 2
  pairs = x_TH[:, :half] + 1j * x_TH[:, half:]
  angles = np.outer(np.arange(num_tokens), base ** (-np.arange(half) / half))
  turned = pairs * np.exp(1j * angles)
  return np.concatenate([turned.real, turned.imag], axis=1)


def _project(params: Any, x_TD: np.ndarray, head: int) -> np.ndarray:
  bias = params['bias'][head] if 'bias' in params else 0.0
  return x_TD @ params['kernel'][:, head] + bias


def _attend(
  config: transformer.TransformerConfig, params: Any, x_TD: np.ndarray
) -> np.ndarray:
  kv_heads = config.num_kv_heads or config.num_heads
  total_TD = np.zeros_like(x_TD) + params['out'].get('bias', 0.0)
  for head in range(config.num_heads):
    kv_head = head * kv_heads // config.num_heads
    q_TH = _project(params['query'], x_TD, head)
    k_TH = _project(params['key'], x_TD, kv_head)
    v_TH = _project(params['value'], x_TD, kv_head)
    if config.qk_norm:
      q_TH = _norm(config, params['query_norm'], q_TH)
      k_TH = _norm(config, params['key_norm'], k_TH)
    if config.positions == 'rotary':
      q_TH = _rotate(q_TH, config.rotary_base)
      k_TH = _rotate(k_TH, config.rotary_base)
    for token in range(len(x_TD)):
      end = token + 1 if config.causal else len(x_TD)
      scores = k_TH[:end] @ q_TH[token] / math.sqrt(len(q_TH[token]))
      weights = np.exp(scores - scores.max())
      mixed_H = weights @ v_TH[:end] / weights.sum()
      total_TD[token] += mixed_H @ params['out']['kernel'][head]
  return total_TD


def _mlp(
  config: transformer.TransformerConfig, params: Any, x_TD: np.ndarray
) -> np.ndarray:
  def linear(params: Any, x: np.ndarray) -> np.ndarray:
    return x @ params['kernel'] + params.get('bias', 0.0)

  up = linear(params['up'], x_TD)
  if config.gated:
    hidden = _activate(config.activation, linear(params['gate'], x_TD)) * up
  else:
    hidden = _activate(config.activation, up)
  return linear(params['down'], hidden)


def _layer(
  config: transformer.TransformerConfig, params: Any, x_TD: np.ndarray
) -> np.ndarray:
  if config.norm_placement == 'pre':
    h_TD = _norm(config, params['attention_norm'], x_TD)
    x_TD = x_TD + _attend(config, params['attention'], h_TD)
    h_TD = _norm(config, params['mlp_norm'], x_TD)
    return x_TD + _mlp(config, params['mlp'], h_TD)
  x_TD = x_TD + _attend(config, params['attention'], x_TD)
  x_TD = _norm(config, params['attention_norm'], x_TD)
  x_TD = x_TD + _mlp(config, params['mlp'], x_TD)
  return _norm(config, params['mlp_norm'], x_TD)


def _reference(
  config: transformer.TransformerConfig, params: Any, tokens_T: np.ndarray
) -> np.ndarray:
  """Logits [T, V] of one row."""
  tables = params['embedding']
  x_TD = tables['tokens'][tokens_T]
  if config.positions == 'learned':
    x_TD = x_TD + tables['positions'][: len(tokens_T)]
  if config.num_token_types:
    x_TD = x_TD + tables['token_types'][0]
  if config.norm_placement == 'post':
    x_TD = _norm(config, tables['norm'], x_TD)
  for layer in params['layers']:
    x_TD = _layer(config, layer, x_TD)
  if config.norm_placement == 'pre':
    x_TD = _norm(config, params['final_norm'], x_TD)
  head = params.get('head', {})
  if config.mlm_head:
    dense = head['transform']
    x_TD = _activate(config.activation, x_TD @ dense['kernel'] + dense['bias'])
    x_TD = _norm(config, head['norm'], x_TD)
  kernel_DV = tables['tokens'].T if config.tie_embeddings else head['kernel']
  return x_TD @ kernel_DV + head.get('bias', 0.0)


def _float64(tree: Any) -> Any:
  if isinstance(tree, dict):
    return {name: _float64(value) for name, value in tree.items()}
  if isinstance(tree, tuple):
    return tuple(_float64(value) for value in tree)
  return np.asarray(tree, np.float64)


@pytest.mark.parametrize('name', architectures.ARCHITECTURES)
def test_logits_agree_with_numpy(name: str) -> None:
  config = architectures.ARCHITECTURES[name]
  params = architectures.params(name)
  exact = _float64(transformer.unstack_layers(params))
  expected = [_reference(config, exact, tokens_T) for tokens_T in _TOKENS]
  output = architectures.forward(config, params, _TOKENS)
  # Float32 rounding through two layers, in logits of size about 3.
  np.testing.assert_allclose(output.logits, expected, atol=2e-5)


def test_long_waves_are_stretched_and_short_ones_stay() -> None:
  scaling = rotary.Scaling(
    factor=8.0, low_factor=1.0, high_factor=4.0, original_positions=100
  )
  # Waves that 100 tokens hold half, 1, 2.5, 4 and 10 times.
  rates = 2 * math.pi * np.array([0.005, 0.01, 0.025, 0.04, 0.1])
  # Of the third wave both count half.
  wanted = rates * np.array([1 / 8, 1 / 8, (1 / 8 + 1) / 2, 1, 1])
  np.testing.assert_allclose(scaling.stretch(rates), wanted, rtol=1e-12)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

  def score(query_position: int, key_position: int) -> float:
    turned = [
      rotary.rotate(
        x,
        rotary.tables(jnp.array([[position]]), head_dim=8, base=10_000.0),
      )
      for x, position in ((q, query_position), (k, key_position))
    ]
    return float((turned[0] * turned[1]).sum())

  assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-5)
  assert abs(score(9, 4) - score(9, 5)) > 1e-2
