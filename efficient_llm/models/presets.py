"""Named model configurations: test size, a small ladder, the papers' models.

Width, depth and vocabulary of published models are from their papers or model
cards; `num_params` of each is tested against the published count.
"""

import dataclasses

from efficient_llm.models.config import TransformerConfig

_GPT2 = TransformerConfig(
  vocab_size=50_257,
  max_positions=1024,
  norm='layer',
  norm_epsilon=1e-5,
  positions='learned',
  activation='gelu_tanh',
  gated=False,
  bias=True,
  qkv_bias=True,
  init_std=0.02,
)

_BERT = TransformerConfig(
  vocab_size=30_522,
  max_positions=512,
  causal=False,
  norm='layer',
  norm_placement='post',
  norm_epsilon=1e-12,
  positions='learned',
  activation='gelu',
  gated=False,
  bias=True,
  qkv_bias=True,
  num_token_types=2,
  mlm_head=True,
  head_bias=True,
  init_std=0.02,
)

_LLAMA = TransformerConfig(
  norm_epsilon=1e-5, tie_embeddings=False, rotary_base=500_000.0
)

_QWEN3 = TransformerConfig(
  vocab_size=151_936,
  max_positions=40_960,
  norm_epsilon=1e-6,
  rotary_base=1_000_000.0,
  qk_norm=True,
  head_dim=128,
)

# Also of other sizes and classes, as timm has them.
VIT = TransformerConfig(
  vocab_size=1000,
  causal=False,
  norm='layer',
  norm_epsilon=1e-6,
  positions='learned',
  activation='gelu',
  gated=False,
  bias=True,
  qkv_bias=True,
  tie_embeddings=False,
  head_bias=True,
  init_std=0.02,
  patch_size=16,
  image_size=224,
)

_CAIT = dataclasses.replace(
  VIT, class_layers=2, talking_heads=True, layer_scale=1e-5
)


def _with(base: TransformerConfig, **changes: object) -> TransformerConfig:
  return dataclasses.replace(base, **changes)


def _shape(layers: int, embed: int, heads: int, **more: object) -> dict:
  return dict(num_layers=layers, embed_dim=embed, num_heads=heads, **more)


def _rung(layers: int, embed: int, heads: int) -> TransformerConfig:
  # Unrolled, as these train on CPUs, where a scan copies: a fifth faster.
  shape = _shape(layers, embed, heads)
  return TransformerConfig(**shape, scan_unroll=layers)


PRESETS: dict[str, TransformerConfig] = {
  # Seconds on a laptop; the ladder shares one shape rule, for scaling laws.
  'test': TransformerConfig(**_shape(2, 32, 2, max_positions=128)),
  'ladder_200k': _rung(4, 64, 4),
  'ladder_1m': _rung(5, 128, 4),
  'ladder_5m': _rung(6, 256, 8),
  'ladder_10m': _rung(8, 320, 10),
  'ladder_30m': _rung(10, 512, 8),
  # Radford et al. 2019, table 2.
  'gpt2': _with(_GPT2, **_shape(12, 768, 12)),
  'gpt2_medium': _with(_GPT2, **_shape(24, 1024, 16)),
  # Devlin et al. 2019; BERT-Small as in LiGO (Wang et al. 2023, table 1).
  'bert_small': _with(_BERT, **_shape(6, 512, 8)),
  'bert_base': _with(_BERT, **_shape(12, 768, 12)),
  'bert_large': _with(_BERT, **_shape(24, 1024, 16)),
  # Liu et al. 2019: BERT's shape, another vocabulary, no token types.
  'roberta_small': _with(
    _BERT,
    **_shape(6, 512, 8, vocab_size=50_265, num_token_types=0),
    norm_epsilon=1e-5,
  ),
  'roberta_base': _with(
    _BERT,
    **_shape(12, 768, 12, vocab_size=50_265, num_token_types=0),
    norm_epsilon=1e-5,
  ),
  # About GPT-3's small shapes in Llama style, for speed measurements.
  'llama_350m': _with(
    _LLAMA,
    **_shape(24, 1024, 16, num_kv_heads=8, mlp_dim=2816, vocab_size=32_000),
    max_positions=4096,
  ),
  # Llama 3.2 and 3.1 model cards.
  'llama_1b': _with(
    _LLAMA,
    **_shape(16, 2048, 32, num_kv_heads=8, mlp_dim=8192, vocab_size=128_256),
    max_positions=131_072,
    rotary_factor=32.0,
    tie_embeddings=True,
  ),
  'llama_8b': _with(
    _LLAMA,
    **_shape(32, 4096, 32, num_kv_heads=8, mlp_dim=14_336, vocab_size=128_256),
    max_positions=131_072,
    rotary_factor=8.0,
  ),
  # Qwen3 technical report, table 1.
  'qwen3_600m': _with(
    _QWEN3, **_shape(28, 1024, 16, num_kv_heads=8, mlp_dim=3072)
  ),
  'qwen3_1_7b': _with(
    _QWEN3, **_shape(28, 2048, 16, num_kv_heads=8, mlp_dim=6144)
  ),
  # For scikit-learn's digits; not of a paper.
  'cait_digits': _with(
    _CAIT,
    **_shape(4, 64, 4, vocab_size=10, scan_unroll=4),
    patch_size=2,
    image_size=8,
    image_channels=1,
    layer_scale=0.1,
    init_std=None,
  ),
  # Touvron et al. 2021: DeiT's table 1, without distillation, and CaiT's table
  # 3, whose layers behind the 24 are the class token's.
  'deit_small': _with(VIT, **_shape(12, 384, 6)),
  'deit_base': _with(VIT, **_shape(12, 768, 12)),
  'cait_xs24': _with(_CAIT, **_shape(24, 288, 6)),
  'cait_s24': _with(_CAIT, **_shape(24, 384, 8)),
}


def get(name: str, **changes: object) -> TransformerConfig:
  """A named configuration, with some fields changed.

  Args:
    name: One of `PRESETS`.
    **changes: Fields of `TransformerConfig`.
  Raises:
    ValueError: If there is no such name; lists the names there are.
  """
  if name not in PRESETS:
    raise ValueError(
      f'Unknown model preset {name!r}; choose one of {", ".join(PRESETS)}.'
    )
  return dataclasses.replace(PRESETS[name], **changes)
