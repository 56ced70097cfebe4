"""The stack against the models of Hugging Face transformers, random weights.

Runs only where the extra with PyTorch and transformers is installed.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from efficient_llm.models import transformer
from tests.models import architectures

torch = pytest.importorskip('torch', reason='needs the extra [hf] and PyTorch')
hf = pytest.importorskip('transformers', reason='needs the extra [hf]')

_TOKENS = architectures.tokens(2, 6)
# Qwen2 has biases, Qwen3 norms of queries and keys; none has both.
_QWEN = architectures.ARCHITECTURES['qwen']
_CONFIGS = {
  'llama': architectures.ARCHITECTURES['llama'],
  'qwen2': dataclasses.replace(_QWEN, qk_norm=False, head_dim=4),
  'qwen3': dataclasses.replace(_QWEN, qkv_bias=False),
  'gpt2': architectures.ARCHITECTURES['gpt2'],
  'bert': architectures.ARCHITECTURES['bert'],
}


def _randomise(model: Any) -> dict[str, np.ndarray]:
  """Makes norms and biases random too, and returns all weights."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for weight in model.parameters():
      noise = torch.randn(weight.shape, generator=generator)
      weight.add_(0.1 * noise)
  return {name: value.numpy() for name, value in model.state_dict().items()}


def _norm(weights: Any, name: str) -> dict[str, np.ndarray]:
  norm = {'scale': weights[f'{name}.weight']}
  if f'{name}.bias' in weights:
    norm['bias'] = weights[f'{name}.bias']
  return norm


def _linear(
  weights: Any, name: str, *, shape: tuple[int, ...] | None = None
) -> dict[str, np.ndarray]:
  """Torch stores outputs first; `shape` splits heads."""
  kernel = weights[f'{name}.weight'].T
  linear = {'kernel': kernel if shape is None else kernel.reshape(shape)}
  if f'{name}.bias' in weights:
    bias = weights[f'{name}.bias']
    heads = linear['kernel'].shape[1:]
    linear['bias'] = (
      bias if bias.size != np.prod(heads) else bias.reshape(heads)
    )
  return linear


def _stack(layers: list[Any]) -> Any:
  first = layers[0]
  if isinstance(first, dict):
    return {name: _stack([layer[name] for layer in layers]) for name in first}
  return np.stack(layers)


def _llama(config: transformer.TransformerConfig, weights: Any) -> Any:
  embed, head_dim = config.embed_dim, config.sizes['head_dim']
  q_shape = (embed, config.num_heads, head_dim)
  kv_shape = (embed, config.sizes['kv_heads'], head_dim)

  def layer(index: int) -> Any:
    name = f'model.layers.{index}'
    attention = {
      'query': _linear(weights, f'{name}.self_attn.q_proj', shape=q_shape),
      'key': _linear(weights, f'{name}.self_attn.k_proj', shape=kv_shape),
      'value': _linear(weights, f'{name}.self_attn.v_proj', shape=kv_shape),
      'out': _linear(
        weights,
        f'{name}.self_attn.o_proj',
        shape=(config.num_heads, head_dim, embed),
      ),
    }
    if config.qk_norm:
      attention['query_norm'] = _norm(weights, f'{name}.self_attn.q_norm')
      attention['key_norm'] = _norm(weights, f'{name}.self_attn.k_norm')
    return {
      'attention_norm': _norm(weights, f'{name}.input_layernorm'),
      'attention': attention,
      'mlp_norm': _norm(weights, f'{name}.post_attention_layernorm'),
      'mlp': {
        part: _linear(weights, f'{name}.mlp.{part}_proj')
        for part in ('up', 'gate', 'down')
      },
    }

  params = {
    'embedding': {'tokens': weights['model.embed_tokens.weight']},
    'layers': _stack([layer(i) for i in range(config.num_layers)]),
    'final_norm': _norm(weights, 'model.norm'),
  }
  if not config.tie_embeddings:
    params['head'] = {'kernel': weights['lm_head.weight'].T}
  return params


def _gpt2(config: transformer.TransformerConfig, weights: Any) -> Any:
  embed, heads = config.embed_dim, config.num_heads
  head_dim = embed // heads

  def conv(name: str) -> dict[str, np.ndarray]:
    """GPT-2 stores inputs first."""
    return {
      'kernel': weights[f'{name}.weight'],
      'bias': weights[f'{name}.bias'],
    }

  def layer(index: int) -> Any:
    name = f'transformer.h.{index}'
    joint = conv(f'{name}.attn.c_attn')
    kernels = np.split(joint['kernel'], 3, axis=1)
    biases = np.split(joint['bias'], 3)
    attention: dict[str, Any] = {
      part: {
        'kernel': kernel.reshape(embed, heads, head_dim),
        'bias': bias.reshape(heads, head_dim),
      }
      for part, kernel, bias in zip(
        ('query', 'key', 'value'), kernels, biases, strict=True
      )
    }
    out = conv(f'{name}.attn.c_proj')
    out['kernel'] = out['kernel'].reshape(heads, head_dim, embed)
    return {
      'attention_norm': _norm(weights, f'{name}.ln_1'),
      'attention': {**attention, 'out': out},
      'mlp_norm': _norm(weights, f'{name}.ln_2'),
      'mlp': {
        'up': conv(f'{name}.mlp.c_fc'),
        'down': conv(f'{name}.mlp.c_proj'),
      },
    }

  return {
    'embedding': {
      'tokens': weights['transformer.wte.weight'],
      'positions': weights['transformer.wpe.weight'],
    },
    'layers': _stack([layer(i) for i in range(config.num_layers)]),
    'final_norm': _norm(weights, 'transformer.ln_f'),
  }


def _bert(config: transformer.TransformerConfig, weights: Any) -> Any:
  embed, heads = config.embed_dim, config.num_heads
  head_dim = embed // heads

  def layer(index: int) -> Any:
    name = f'bert.encoder.layer.{index}'
    attention = {
      part: _linear(
        weights, f'{name}.attention.self.{part}', shape=(embed, heads, head_dim)
      )
      for part in ('query', 'key', 'value')
    }
    attention['out'] = _linear(
      weights,
      f'{name}.attention.output.dense',
      shape=(heads, head_dim, embed),
    )
    return {
      'attention_norm': _norm(weights, f'{name}.attention.output.LayerNorm'),
      'attention': attention,
      'mlp_norm': _norm(weights, f'{name}.output.LayerNorm'),
      'mlp': {
        'up': _linear(weights, f'{name}.intermediate.dense'),
        'down': _linear(weights, f'{name}.output.dense'),
      },
    }

  tables = 'bert.embeddings'
  return {
    'embedding': {
      'tokens': weights[f'{tables}.word_embeddings.weight'],
      'positions': weights[f'{tables}.position_embeddings.weight'],
      'token_types': weights[f'{tables}.token_type_embeddings.weight'],
      'norm': _norm(weights, f'{tables}.LayerNorm'),
    },
    'layers': _stack([layer(i) for i in range(config.num_layers)]),
    'head': {
      'transform': _linear(weights, 'cls.predictions.transform.dense'),
      'norm': _norm(weights, 'cls.predictions.transform.LayerNorm'),
      'bias': weights['cls.predictions.bias'],
    },
  }


def _peer(name: str, config: transformer.TransformerConfig) -> tuple[Any, Any]:
  """The peer with random weights, and ours with the same."""
  sizes = config.sizes
  common = {
    'vocab_size': sizes['vocab'],
    'hidden_size': sizes['embed'],
    'num_hidden_layers': sizes['layers'],
    'num_attention_heads': sizes['heads'],
    'intermediate_size': sizes['mlp'],
    'max_position_embeddings': sizes['positions'],
  }
  llama = {
    **common,
    'num_key_value_heads': sizes['kv_heads'],
    'head_dim': sizes['head_dim'],
    'rms_norm_eps': config.norm_epsilon,
    'tie_word_embeddings': config.tie_embeddings,
    'rope_parameters': {
      'rope_type': 'default',
      'rope_theta': config.rotary_base,
    },
  }
  torch.manual_seed(0)
  if name == 'llama':
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**llama))
    convert = _llama
  elif name == 'qwen2':
    model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**llama))
    convert = _llama
  elif name == 'qwen3':
    model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**llama))
    convert = _llama
  elif name == 'gpt2':
    model = hf.GPT2LMHeadModel(
      hf.GPT2Config(
        vocab_size=sizes['vocab'],
        n_embd=sizes['embed'],
        n_layer=sizes['layers'],
        n_head=sizes['heads'],
        n_inner=sizes['mlp'],
        n_positions=sizes['positions'],
      )
    )
    convert = _gpt2
  else:
    model = hf.BertForMaskedLM(
      hf.BertConfig(**common, layer_norm_eps=config.norm_epsilon)
    )
    convert = _bert
  model.eval()
  return model, convert(config, _randomise(model))


@pytest.mark.parametrize('name', _CONFIGS)
def test_logits_agree_with_transformers(name: str) -> None:
  config = _CONFIGS[name]
  model, params = _peer(name, config)
  with torch.no_grad():
    expected = model(torch.from_numpy(_TOKENS).long()).logits.numpy()
  output = architectures.forward(config, params, _TOKENS)
  # Float32 rounding of both sides, in logits of size about 1.
  np.testing.assert_allclose(output.logits, expected, atol=1e-5)
