"""BERT and RoBERTa as transformers names them.

Both store the norms of old files as gamma and beta. RoBERTa counts positions
from behind its padding token, so that its table begins with unused rows.

Source: Devlin et al. 2019, Liu et al. 2019; names of transformers'
BertForMaskedLM and RobertaForMaskedLM.
"""

import re
from typing import Any

from efficient_llm.models.config import TransformerConfig
from efficient_llm.models.huggingface import family, rules

_BARE = ('BertModel', 'RobertaModel')


def _read(config: family.Settings) -> TransformerConfig:
  has_head = config.architecture not in _BARE
  offset = 0
  if config.values.get('model_type') == 'roberta':
    offset = config.count('pad_token_id', default=1) + 1
  return TransformerConfig(
    vocab_size=config.count('vocab_size'),
    num_layers=config.count('num_hidden_layers'),
    embed_dim=config.count('hidden_size'),
    num_heads=config.count('num_attention_heads'),
    mlp_dim=config.count('intermediate_size'),
    max_positions=config.count('max_position_embeddings') - offset,
    position_offset=offset,
    causal=False,
    norm='layer',
    norm_placement='post',
    norm_epsilon=config.number('layer_norm_eps', default=1e-12),
    positions='learned',
    activation=config.activation('hidden_act'),
    gated=False,
    bias=True,
    qkv_bias=True,
    num_token_types=config.count('type_vocab_size', default=2),
    mlm_head=has_head,
    head_bias=has_head,
    tie_embeddings=not has_head
    or config.flag('tie_word_embeddings', default=True),
    init_std=config.number('initializer_range', default=0.02),
  )


def _write(config: TransformerConfig) -> dict[str, Any]:
  offset = config.position_offset
  return {
    'vocab_size': config.vocab_size,
    'num_hidden_layers': config.num_layers,
    'hidden_size': config.embed_dim,
    'num_attention_heads': config.num_heads,
    'intermediate_size': config.sizes['mlp'],
    'max_position_embeddings': config.max_positions + offset,
    'layer_norm_eps': config.norm_epsilon,
    'hidden_act': family.NAMES[config.activation],
    'type_vocab_size': config.num_token_types,
    'tie_word_embeddings': config.tie_embeddings,
    'initializer_range': config.init_std or 0.02,
    'pad_token_id': offset - 1 if offset else 0,
  }


def _linear(tensor: str, leaf: str) -> tuple[rules.Rule, ...]:
  return (
    rules.Rule(f'{tensor}.weight', f'{leaf}/kernel', 'transposed'),
    rules.Rule(f'{tensor}.bias', f'{leaf}/bias'),
  )


def _norm(tensor: str, leaf: str) -> tuple[rules.Rule, ...]:
  return (
    rules.Rule(f'{tensor}.weight', f'{leaf}/scale'),
    rules.Rule(f'{tensor}.bias', f'{leaf}/bias'),
  )


def _encoder(name: str) -> tuple[rules.Rule, ...]:
  """What both have below the head."""
  tables, layer = f'{name}.embeddings.', f'{name}.encoder.layer.{rules.LAYER}.'
  attention = f'{layer}attention.'
  return (
    rules.Rule(f'{tables}word_embeddings.weight', 'embedding/tokens'),
    rules.Rule(f'{tables}position_embeddings.weight', 'embedding/positions'),
    rules.Rule(
      f'{tables}token_type_embeddings.weight', 'embedding/token_types'
    ),
    *_norm(f'{tables}LayerNorm', 'embedding/norm'),
    *_linear(f'{attention}self.query', 'layers/attention/query'),
    *_linear(f'{attention}self.key', 'layers/attention/key'),
    *_linear(f'{attention}self.value', 'layers/attention/value'),
    *_linear(f'{attention}output.dense', 'layers/attention/out'),
    *_norm(f'{attention}output.LayerNorm', 'layers/attention_norm'),
    *_linear(f'{layer}intermediate.dense', 'layers/mlp/up'),
    *_linear(f'{layer}output.dense', 'layers/mlp/down'),
    *_norm(f'{layer}output.LayerNorm', 'layers/mlp_norm'),
  )


_RENAMED = (
  ('LayerNorm.gamma', 'LayerNorm.weight'),
  ('LayerNorm.beta', 'LayerNorm.bias'),
)
# Positions in order, and what stands on the first token for whole sequences.
_IGNORED = (
  r'(bert\.|roberta\.)?(embeddings\.(position|token_type)_ids|pooler\..*)'
)
_REFUSED = {
  'position_embedding_type': ('absolute',),
  'is_decoder': (False,),
  'add_cross_attention': (False,),
}

BERT = family.Family(
  model_type='bert',
  prefix='bert.',
  architectures=('BertForMaskedLM', 'BertModel', 'BertForPreTraining'),
  read=_read,
  write=_write,
  table=(
    *_encoder('bert'),
    *_linear('cls.predictions.transform.dense', 'head/transform'),
    *_norm('cls.predictions.transform.LayerNorm', 'head/norm'),
    rules.Rule('cls.predictions.bias', 'head/bias'),
    rules.Rule('cls.predictions.decoder.weight', 'head/kernel', 'transposed'),
  ),
  ignored=(re.compile(_IGNORED), re.compile(r'cls\.seq_relationship\..*')),
  renamed=_RENAMED,
  copies={'cls.predictions.decoder.bias': 'cls.predictions.bias'},
  tied={
    'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight'
  },
  refused=_REFUSED,
)

ROBERTA = family.Family(
  model_type='roberta',
  prefix='roberta.',
  architectures=('RobertaForMaskedLM', 'RobertaModel'),
  read=_read,
  write=_write,
  table=(
    *_encoder('roberta'),
    *_linear('lm_head.dense', 'head/transform'),
    *_norm('lm_head.layer_norm', 'head/norm'),
    rules.Rule('lm_head.bias', 'head/bias'),
    rules.Rule('lm_head.decoder.weight', 'head/kernel', 'transposed'),
  ),
  ignored=(re.compile(_IGNORED),),
  renamed=_RENAMED,
  copies={'lm_head.decoder.bias': 'lm_head.bias'},
  tied={'lm_head.decoder.weight': 'roberta.embeddings.word_embeddings.weight'},
  # Its head has this activation whatever the layers have.
  refused={**_REFUSED, 'hidden_act': ('gelu',)},
)
