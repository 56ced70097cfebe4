"""GPT-2 as transformers names it. Its Conv1D has inputs first, as we do.

Source: Radford et al. 2019; names of transformers' GPT2LMHeadModel.
"""

import re
from typing import Any

from efficient_llm.models.config import TransformerConfig
from efficient_llm.models.huggingface import family, rules

_H = 'transformer.h.{layer}.'


def _read(config: family.Settings) -> TransformerConfig:
  embed_dim = config.count('n_embd')
  return TransformerConfig(
    vocab_size=config.count('vocab_size'),
    num_layers=config.count('n_layer'),
    embed_dim=embed_dim,
    num_heads=config.count('n_head'),
    mlp_dim=config.count('n_inner', default=4 * embed_dim),
    max_positions=config.count('n_positions'),
    norm='layer',
    norm_epsilon=config.number('layer_norm_epsilon', default=1e-5),
    positions='learned',
    activation=config.activation('activation_function'),
    gated=False,
    bias=True,
    qkv_bias=True,
    tie_embeddings=config.flag('tie_word_embeddings', default=True),
    init_std=config.number('initializer_range', default=0.02),
  )


def _write(config: TransformerConfig) -> dict[str, Any]:
  return {
    'vocab_size': config.vocab_size,
    'n_layer': config.num_layers,
    'n_embd': config.embed_dim,
    'n_head': config.num_heads,
    'n_inner': config.sizes['mlp'],
    'n_positions': config.max_positions,
    'layer_norm_epsilon': config.norm_epsilon,
    'activation_function': family.NAMES[config.activation],
    'tie_word_embeddings': config.tie_embeddings,
    'initializer_range': config.init_std or 0.02,
  }


def _fused(ending: str, leaf: str) -> list[rules.Rule]:
  return [
    rules.Rule(
      f'{_H}attn.c_attn.{ending}', f'layers/attention/{name}/{leaf}', part=part
    )
    for name, part in (('query', (0, 3)), ('key', (1, 3)), ('value', (2, 3)))
  ]


FAMILY = family.Family(
  model_type='gpt2',
  prefix='transformer.',
  architectures=('GPT2LMHeadModel', 'GPT2Model'),
  read=_read,
  write=_write,
  table=(
    rules.Rule('transformer.wte.weight', 'embedding/tokens'),
    rules.Rule('transformer.wpe.weight', 'embedding/positions'),
    rules.Rule('transformer.ln_f.weight', 'final_norm/scale'),
    rules.Rule('transformer.ln_f.bias', 'final_norm/bias'),
    rules.Rule('lm_head.weight', 'head/kernel', 'transposed'),
    rules.Rule(f'{_H}ln_1.weight', 'layers/attention_norm/scale'),
    rules.Rule(f'{_H}ln_1.bias', 'layers/attention_norm/bias'),
    *_fused('weight', 'kernel'),
    *_fused('bias', 'bias'),
    rules.Rule(f'{_H}attn.c_proj.weight', 'layers/attention/out/kernel'),
    rules.Rule(f'{_H}attn.c_proj.bias', 'layers/attention/out/bias'),
    rules.Rule(f'{_H}ln_2.weight', 'layers/mlp_norm/scale'),
    rules.Rule(f'{_H}ln_2.bias', 'layers/mlp_norm/bias'),
    rules.Rule(f'{_H}mlp.c_fc.weight', 'layers/mlp/up/kernel'),
    rules.Rule(f'{_H}mlp.c_fc.bias', 'layers/mlp/up/bias'),
    rules.Rule(f'{_H}mlp.c_proj.weight', 'layers/mlp/down/kernel'),
    rules.Rule(f'{_H}mlp.c_proj.bias', 'layers/mlp/down/bias'),
  ),
  # Causal masks, which old files store.
  ignored=(re.compile(r'(transformer\.)?h\.\d+\.attn\.(masked_)?bias'),),
  tied={'lm_head.weight': 'transformer.wte.weight'},
  refused={
    'scale_attn_weights': (True,),
    'scale_attn_by_inverse_layer_idx': (False,),
    'add_cross_attention': (False,),
  },
)
