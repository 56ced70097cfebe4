"""Whether one model can grow into another."""

import dataclasses

from efficient_llm.models.config import TransformerConfig

# Sizes that may grow, and how heads must.
_GROWING = ('layers', 'embed', 'mlp', 'heads', 'kv_heads')
# Settings that do not decide about parameters' shapes or meaning.
_FREE = (
  'num_layers',
  'embed_dim',
  'num_heads',
  'num_kv_heads',
  'head_dim',
  'mlp_dim',
  'norm_epsilon',
  'init_std',
  'layer_scale',
  'dtype',
  'remat',
  'scan_unroll',
  'attention_implementation',
)


def check(small: TransformerConfig, large: TransformerConfig) -> None:
  """Refuses pairs of which no method makes sense.

  Args:
    small: The model that is trained.
    large: The model that is wanted.
  Raises:
    ValueError: Naming the first setting that does not go together.
  """
  small.validate()
  large.validate()
  for field in dataclasses.fields(small):
    ours, theirs = getattr(small, field.name), getattr(large, field.name)
    if field.name not in _FREE and ours != theirs:
      raise ValueError(
        f'model.{field.name} must be {ours!r}, as in the small model, is '
        f'{theirs!r}; models of another kind cannot grow into each other.'
      )
  if (small.layer_scale is None) != (large.layer_scale is None):
    raise ValueError(
      f'model.layer_scale must be {small.layer_scale}, as in the small model, '
      f'or another number if that is one; is {large.layer_scale}.'
    )
  if small.sizes['head_dim'] != large.sizes['head_dim']:
    raise ValueError(
      f'The size of a head must stay {small.sizes["head_dim"]}, is '
      f'{large.sizes["head_dim"]}; set model.num_heads='
      f'{large.embed_dim // small.sizes["head_dim"]} or model.head_dim.'
    )
  for name in _GROWING:
    ours, theirs = small.sizes[name], large.sizes[name]
    if theirs < ours:
      raise ValueError(
        f'The large model must have at least the {ours} {name} of the small '
        f'one, has {theirs}; models only grow.'
      )
  ours, theirs = group_size(small), group_size(large)
  if theirs < ours:
    raise ValueError(
      f'A key/value head must serve at least {ours} query heads, as in the '
      f'small model, serves {theirs}; lower model.num_kv_heads.'
    )


def group_size(config: TransformerConfig) -> int:
  """Query heads that share a key/value head."""
  return config.sizes['heads'] // config.sizes['kv_heads']
