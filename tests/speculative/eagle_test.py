"""Drafters of EAGLE's form: their passes, and the layout of their files."""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import transformer
from efficient_llm.models.huggingface import shards
from efficient_llm.speculative import drafter, eagle
from tests import tiny

# Grouped heads whose norms and biases the drafter does without.
_MODEL = dataclasses.replace(
  tiny.SMALL_VOCAB, num_heads=4, num_kv_heads=2, qk_norm=True, qkv_bias=True
)
_NUM_TOKENS = 7


@functools.cache
def _params() -> Any:
  make = jax.jit(drafter.init, static_argnums=0, static_argnames='form')
  params = make(_MODEL, jax.random.key(1), form='eagle')
  # A norm that is not only of ones.
  scale = params['block']['mlp_norm']['scale']
  scale += jnp.linspace(-0.5, 0.5, len(scale))
  return params


def _pairs() -> tuple[np.ndarray, np.ndarray]:
  """Tokens x_{t+1} and features h_t of one row."""
  rng = np.random.default_rng(2)
  tokens = rng.integers(0, _MODEL.vocab_size, (1, _NUM_TOKENS), np.int32)
  hidden = rng.normal(size=(1, _NUM_TOKENS, _MODEL.embed_dim))
  return tokens, hidden.astype(np.float32)


def _read(folder: pathlib.Path) -> dict[str, np.ndarray]:
  return {
    name: np.asarray(tensor.read(0, tensor.shape[0]), np.float64)
    for name, tensor in shards.open_folder(folder).items()
  }


def _rotated(x_TNH: np.ndarray, base: float) -> np.ndarray:
  half = x_TNH.shape[-1] // 2
  angles = np.arange(len(x_TNH))[:, None] * base ** (-np.arange(half) / half)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
  a, b = x_TNH[..., :half], x_TNH[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _eagle(
  w: dict[str, np.ndarray],
  config: dict[str, Any],
  table_VD: np.ndarray,
  tokens_T: np.ndarray,
  hidden_TD: np.ndarray,
) -> np.ndarray:
  """EAGLE's draft model as its authors describe it, in plain numpy."""
  x = np.concatenate([table_VD[tokens_T], hidden_TD], -1)
  x = x @ w['fc.weight'].T + w.get('fc.bias', 0)
  layer, size = 'layers.0.', config['head_dim']
  q, k, v = (
    (x @ w[f'{layer}self_attn.{part}_proj.weight'].T).reshape(
      len(tokens_T), -1, size
    )
    for part in 'qkv'
  )
  q, k = (_rotated(part, config['rope_theta']) for part in (q, k))
  group = config['num_attention_heads'] // config['num_key_value_heads']
  heads = []
  for head in range(config['num_attention_heads']):
    scores = q[:, head] @ k[:, head // group].T / math.sqrt(size)
    scores[np.triu_indices(len(tokens_T), 1)] = -np.inf
    share = np.exp(scores - scores.max(-1, keepdims=True))
    heads.append(share / share.sum(-1, keepdims=True) @ v[:, head // group])
  x = x + np.concatenate(heads, -1) @ w[f'{layer}self_attn.o_proj.weight'].T
  square = (x**2).mean(-1, keepdims=True) + config['rms_norm_eps']
  y = x / np.sqrt(square) * w[f'{layer}post_attention_layernorm.weight']
  gate = y @ w[f'{layer}mlp.gate_proj.weight'].T
  y = gate / (1 + np.exp(-gate)) * (y @ w[f'{layer}mlp.up_proj.weight'].T)
  return x + y @ w[f'{layer}mlp.down_proj.weight'].T


@pytest.mark.parametrize('engine', ['vllm', 'sglang'])
def test_the_file_says_what_the_drafter_does(
  engine: eagle.Engine, tmp_path: pathlib.Path
) -> None:
  target = tiny.params(_MODEL)
  eagle.write(tmp_path / 'out', _MODEL, _params(), engine=engine)
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  weights = _read(tmp_path / 'out')
  tokens, hidden = _pairs()
  # The table is the target's, as engines share it.
  table = np.asarray(target['embedding']['tokens'], np.float64)
  wanted = _eagle(weights, config, table, tokens[0], hidden[0])
  forward = jax.jit(drafter.forward, static_argnums=0)
  found, _ = forward(_MODEL, _params(), target, tokens, hidden)
  # Float32 against float64.
  np.testing.assert_allclose(found[0], wanted, atol=5e-5, rtol=5e-5)
  # Its feature goes to the target's head as it is.
  logits = transformer.unembed(_MODEL, target, found)
  np.testing.assert_allclose(logits[0], wanted @ table.T, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize(
  ('engine', 'architecture'),
  [('vllm', 'LlamaForCausalLM'), ('sglang', 'LlamaForCausalLMEagle')],
)
def test_names_shapes_and_settings_are_those_that_an_engine_reads(
  engine: eagle.Engine, architecture: str, tmp_path: pathlib.Path
) -> None:
  eagle.write(
    tmp_path / 'out', _MODEL, _params(), engine=engine, dtype='bfloat16'
  )
  stored = shards.open_folder(tmp_path / 'out')
  mlp = _MODEL.sizes['mlp']
  assert {name: one.shape for name, one in stored.items()} == {
    'fc.weight': (16, 32),
    **({'fc.bias': (16,)} if engine == 'sglang' else {}),
    'layers.0.self_attn.q_proj.weight': (16, 16),
    'layers.0.self_attn.k_proj.weight': (8, 16),
    'layers.0.self_attn.v_proj.weight': (8, 16),
    'layers.0.self_attn.o_proj.weight': (16, 16),
    'layers.0.post_attention_layernorm.weight': (16,),
    'layers.0.mlp.gate_proj.weight': (mlp, 16),
    'layers.0.mlp.up_proj.weight': (mlp, 16),
    'layers.0.mlp.down_proj.weight': (16, mlp),
  }
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  wanted = {
    'architectures': [architecture],
    'model_type': 'llama',
    'num_hidden_layers': 1,
    'attention_bias': False,
    'torch_dtype': 'bfloat16',
  }
  assert {name: config[name] for name in wanted} == wanted
  assert {one.dtype for one in stored.values()} == {'BF16'}


def test_steps_and_a_rebuilt_cache_give_what_a_whole_pass_gives() -> None:
  target, (tokens, hidden) = tiny.params(_MODEL), _pairs()
  forward = jax.jit(drafter.forward, static_argnums=0)
  whole, _ = forward(_MODEL, _params(), target, tokens, hidden)
  rebuilt = jax.jit(drafter.rebuild_cache, static_argnums=0)(
    _MODEL, _params(), target, tokens, hidden, jnp.array([_NUM_TOKENS - 1])
  )
  last, _ = forward(
    _MODEL,
    _params(),
    target,
    tokens[:, -1:],
    hidden[:, -1:],
    cache=rebuilt,
  )
  np.testing.assert_allclose(last[0, 0], whole[0, -1], rtol=1e-4, atol=1e-5)


def test_it_begins_with_the_targets_last_layer_less_its_norms() -> None:
  target = tiny.params(_MODEL)
  params = drafter.init(_MODEL, jax.random.key(0), target, form='eagle')
  assert sorted(params['block']) == ['attention', 'mlp', 'mlp_norm']
  assert sorted(params['block']['attention']) == [
    'key',
    'out',
    'query',
    'value',
  ]
  jax.tree.map(
    np.testing.assert_array_equal,
    params['block']['mlp'],
    jax.tree.map(lambda x: x[-1], target['layers']['mlp']),
  )


def test_what_the_layout_has_no_place_for_is_refused(
  tmp_path: pathlib.Path,
) -> None:
  params = drafter.init(_MODEL, jax.random.key(0))
  with pytest.raises(ValueError, match='no place for the norms of this one'):
    eagle.write(tmp_path / 'out', _MODEL, params, engine='vllm')
  assert not (tmp_path / 'out').exists()
  gpt2 = dataclasses.replace(_MODEL, positions='learned')
  with pytest.raises(ValueError, match=r"model\.positions='rotary'"):
    drafter.init(gpt2, jax.random.key(0), form='eagle')
