"""Llama 2, 3 and 3.1, Qwen2 and 2.5, Qwen3 as transformers names them.

Source: Touvron et al. 2023, arXiv:2307.09288; Qwen2, arXiv:2407.10671; Qwen3,
arXiv:2505.09388; names of transformers' LlamaForCausalLM and its kin.
"""

import re
from collections.abc import Mapping
from typing import Any

from efficient_llm.models.config import TransformerConfig
from efficient_llm.models.huggingface import family, rules

_N = 'model.layers.{layer}.'


def _read(config: family.Settings) -> TransformerConfig:
  """Of all three; they differ in where biases and norms stand."""
  kind = config.values.get('model_type')
  heads = config.count('num_attention_heads')
  embed_dim = config.count('hidden_size')
  qkv_bias = kind == 'qwen2' or config.flag('attention_bias', default=False)
  bias = kind == 'llama' and config.flag('mlp_bias', default=False)
  # Where there is one, the attention's output has it too; ours shares a switch
  # with the MLP.
  out_bias = qkv_bias and kind != 'qwen2'
  if out_bias != bias:
    raise config.refusal(
      'attention_bias', 'as mlp_bias is, as one setting stands for both'
    )
  head_dim = config.count('head_dim', default=max(embed_dim // heads, 1))
  return TransformerConfig(
    vocab_size=config.count('vocab_size'),
    num_layers=config.count('num_hidden_layers'),
    embed_dim=embed_dim,
    num_heads=heads,
    num_kv_heads=config.count('num_key_value_heads', default=heads),
    head_dim=head_dim,
    mlp_dim=config.count('intermediate_size'),
    max_positions=config.count('max_position_embeddings'),
    norm_epsilon=config.number('rms_norm_eps', default=1e-6),
    rotary_base=_rotary_base(config),
    **_rotary_scaling(config),
    activation=config.activation('hidden_act'),
    bias=bias,
    qkv_bias=qkv_bias,
    qk_norm=kind == 'qwen3',
    tie_embeddings=config.flag('tie_word_embeddings', default=False),
    init_std=config.number('initializer_range', default=0.02),
  )


def _rotary_base(config: family.Settings) -> float:
  """From rope_parameters, or rope_theta as files before 2026 have it."""
  rope = config.values.get('rope_parameters')
  if isinstance(rope, Mapping) and 'rope_theta' in rope:
    inner = family.Settings(rope, f'{config.path}: rope_parameters')
    return inner.number('rope_theta')
  return config.number('rope_theta', default=10_000.0)


def _rotary_scaling(config: family.Settings) -> dict[str, Any]:
  """Of Llama 3.1, from rope_parameters or rope_scaling, or none."""
  if config.values.get('layer_types') is not None and any(
    kind != 'full_attention' for kind in config.values['layer_types']
  ):
    raise config.refusal('layer_types', 'full_attention in every layer')
  found = []
  for key in ('rope_scaling', 'rope_parameters'):
    rope = config.values.get(key)
    if rope is None:
      continue
    if not isinstance(rope, Mapping):
      raise config.refusal(key, 'an object')
    kind = rope.get('rope_type', rope.get('type', 'default'))
    share = rope.get('partial_rotary_factor')
    if kind not in ('default', 'llama3') or share not in (None, 1, 1.0):
      raise config.refusal(key, 'of rope_type default or llama3')
    inner = family.Settings(rope, f'{config.path}: {key}')
    found.append({} if kind == 'default' else _scaling(inner))
  if found and found[0] != found[-1]:
    raise config.refusal('rope_scaling', 'as rope_parameters is')
  return found[0] if found else {}


def _scaling(rope: family.Settings) -> dict[str, Any]:
  return {
    'rotary_factor': rope.number('factor'),
    'rotary_low_factor': rope.number('low_freq_factor'),
    'rotary_high_factor': rope.number('high_freq_factor'),
    'rotary_original_positions': rope.count('original_max_position_embeddings'),
  }


def _write(config: TransformerConfig) -> dict[str, Any]:
  sizes = config.sizes
  rope: dict[str, Any] = {
    'rope_type': 'default',
    'rope_theta': config.rotary_base,
  }
  if config.rotary_factor is not None:
    rope |= {
      'rope_type': 'llama3',
      'factor': config.rotary_factor,
      'low_freq_factor': config.rotary_low_factor,
      'high_freq_factor': config.rotary_high_factor,
      'original_max_position_embeddings': config.rotary_original_positions,
    }
  return {
    'vocab_size': config.vocab_size,
    'num_hidden_layers': config.num_layers,
    'hidden_size': config.embed_dim,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': sizes['kv_heads'],
    'head_dim': sizes['head_dim'],
    'intermediate_size': sizes['mlp'],
    'max_position_embeddings': config.max_positions,
    'rms_norm_eps': config.norm_epsilon,
    # Both spellings, so that old and new readers find it.
    'rope_theta': config.rotary_base,
    'rope_parameters': rope,
    'rope_scaling': None if config.rotary_factor is None else rope,
    'hidden_act': family.NAMES[config.activation],
    'tie_word_embeddings': config.tie_embeddings,
    'initializer_range': config.init_std or 0.02,
  }


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
  biases = {'attention_bias': config.qkv_bias, 'mlp_bias': config.bias}
  return _write(config) | biases


def _write_qwen2(config: TransformerConfig) -> dict[str, Any]:
  return _write(config) | {'use_sliding_window': False}


def _write_qwen3(config: TransformerConfig) -> dict[str, Any]:
  return _write_qwen2(config) | {'attention_bias': config.qkv_bias}


def _linear(tensor: str, leaf: str) -> tuple[rules.Rule, ...]:
  return (
    rules.Rule(f'{_N}{tensor}.weight', f'layers/{leaf}/kernel', 'transposed'),
    rules.Rule(f'{_N}{tensor}.bias', f'layers/{leaf}/bias'),
  )


def _scale(tensor: str, leaf: str) -> rules.Rule:
  return rules.Rule(f'{_N}{tensor}.weight', f'layers/{leaf}/scale')


_TABLE = (
  rules.Rule('model.embed_tokens.weight', 'embedding/tokens'),
  rules.Rule('model.norm.weight', 'final_norm/scale'),
  rules.Rule('lm_head.weight', 'head/kernel', 'transposed'),
  _scale('input_layernorm', 'attention_norm'),
  *_linear('self_attn.q_proj', 'attention/query'),
  *_linear('self_attn.k_proj', 'attention/key'),
  *_linear('self_attn.v_proj', 'attention/value'),
  *_linear('self_attn.o_proj', 'attention/out'),
  _scale('self_attn.q_norm', 'attention/query_norm'),
  _scale('self_attn.k_norm', 'attention/key_norm'),
  _scale('post_attention_layernorm', 'mlp_norm'),
  *_linear('mlp.gate_proj', 'mlp/gate'),
  *_linear('mlp.up_proj', 'mlp/up'),
  *_linear('mlp.down_proj', 'mlp/down'),
)
# Old files store the frequencies of the rotary positions.
_IGNORED = (re.compile(r'.*rotary_emb\.inv_freq'),)
_TIED = {'lm_head.weight': 'model.embed_tokens.weight'}

LLAMA = family.Family(
  model_type='llama',
  prefix='model.',
  architectures=('LlamaForCausalLM', 'LlamaModel'),
  read=_read,
  write=_write_llama,
  table=_TABLE,
  ignored=_IGNORED,
  tied=_TIED,
)

QWEN2 = family.Family(
  model_type='qwen2',
  prefix='model.',
  architectures=('Qwen2ForCausalLM', 'Qwen2Model'),
  read=_read,
  write=_write_qwen2,
  table=_TABLE,
  ignored=_IGNORED,
  tied=_TIED,
  refused={'use_sliding_window': (False,)},
)

QWEN3 = family.Family(
  model_type='qwen3',
  prefix='model.',
  architectures=('Qwen3ForCausalLM', 'Qwen3Model'),
  read=_read,
  write=_write_qwen3,
  table=_TABLE,
  ignored=_IGNORED,
  tied=_TIED,
  refused={'use_sliding_window': (False,)},
)
