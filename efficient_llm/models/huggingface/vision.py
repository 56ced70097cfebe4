"""DeiT and CaiT as timm names them. Its config.json names an architecture.

What timm computes and our stack does not have is refused by name: distillation
tokens, DeiT III (gains without talking heads, no position for the class), other
pooling than the class token, images that are not square.

Source: Touvron et al. 2021, arXiv:2012.12877 and arXiv:2103.17239; names of
timm's VisionTransformer and Cait, settings of its save_for_hf.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from efficient_llm.models import presets, vision
from efficient_llm.models.config import TransformerConfig
from efficient_llm.models.huggingface import family, rules

# Width, layers, heads and side of an image of each architecture.
ARCHITECTURES = {
  'deit_base_patch16_224': (768, 12, 12, 224),
  'deit_base_patch16_384': (768, 12, 12, 384),
  'deit_small_patch16_224': (384, 12, 6, 224),
  'deit_tiny_patch16_224': (192, 12, 3, 224),
  'cait_s24_224': (384, 24, 8, 224),
  'cait_s24_384': (384, 24, 8, 384),
  'cait_s36_384': (384, 36, 8, 384),
  'cait_xs24_384': (288, 24, 6, 384),
  'cait_xxs24_224': (192, 24, 4, 224),
  'cait_xxs24_384': (192, 24, 4, 384),
  'cait_xxs36_224': (192, 36, 4, 224),
  'cait_xxs36_384': (192, 36, 4, 384),
  'cait_m36_384': (768, 36, 16, 384),
  'cait_m48_448': (768, 48, 16, 448),
}
_MLP_RATIO = 4.0
_SMALL_GAINS = ('cait_s36_384', 'cait_m36_384', 'cait_m48_448')
# Settings of timm that must be as ours, and those that only training has.
_FIXED = {'global_pool': 'token', 'qkv_bias': True}
_OF_TRAINING = ('drop_rate', 'drop_path_rate', 'weight_init')
_KNOWN = (
  'img_size',
  'patch_size',
  'in_chans',
  'num_classes',
  'embed_dim',
  'depth',
  'num_heads',
  'mlp_ratio',
)
_COLOURS = ('mean', 'std')
_OF_CAIT = ('depth_token_only', 'mlp_ratio_token_only', 'init_values')


def _read(config: family.Settings) -> TransformerConfig:
  name = config.values['architecture']
  if name not in ARCHITECTURES:
    raise config.refusal('architecture', f'one of {", ".join(ARCHITECTURES)}')
  is_cait = name.startswith('cait')
  width, depth, heads, side = ARCHITECTURES[name]
  preparation = _mapping(config, 'pretrained_cfg')
  sizes = preparation.get('input_size')
  defaults = {
    'img_size': sizes[1:] if isinstance(sizes, list) else side,
    'patch_size': 16,
    'in_chans': 3,
    'num_classes': config.values.get('num_classes', 1000),
    'embed_dim': width,
    'depth': depth,
    'num_heads': heads,
    'mlp_ratio': _MLP_RATIO,
  }
  if is_cait:
    gain = 1e-6 if name in _SMALL_GAINS else 1e-5
    defaults |= {'depth_token_only': 2, 'init_values': gain}
    defaults['mlp_ratio_token_only'] = _MLP_RATIO
  given = _mapping(config, 'model_args')
  inner = family.Settings({**defaults, **given}, f'{config.path}: model_args')
  for key, value in given.items():
    if key in _FIXED and value != _FIXED[key]:
      raise inner.refusal(key, repr(_FIXED[key]))
    if key not in {*defaults, *_FIXED, *_OF_TRAINING}:
      raise inner.refusal(key, 'left out')
  ratio = inner.number('mlp_ratio')
  if is_cait and inner.number('mlp_ratio_token_only') != ratio:
    raise inner.refusal('mlp_ratio_token_only', 'as mlp_ratio is')
  embed_dim = inner.count('embed_dim')
  return dataclasses.replace(
    presets.VIT,
    vocab_size=inner.count('num_classes'),
    num_layers=inner.count('depth'),
    embed_dim=embed_dim,
    num_heads=inner.count('num_heads'),
    mlp_dim=int(embed_dim * ratio),
    patch_size=inner.count('patch_size'),
    image_size=_side(inner),
    image_channels=inner.count('in_chans'),
    image_norm=_norm(config, preparation, inner.count('in_chans')),
    class_layers=inner.count('depth_token_only') if is_cait else 0,
    layer_scale=inner.number('init_values') if is_cait else None,
    talking_heads=is_cait,
  )


def _mapping(config: family.Settings, key: str) -> Mapping[str, Any]:
  value = config.values.get(key) or {}
  if not isinstance(value, Mapping):
    raise config.refusal(key, 'an object')
  return value


def _side(config: family.Settings) -> int:
  """Of a square image, which may be given as height and width."""
  value = config.values['img_size']
  if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
    return family.Settings({'img_size': value[0]}, config.path).count(
      'img_size'
    )
  return config.count('img_size')


def _norm(
  config: family.Settings, preparation: Mapping[str, Any], channels: int
) -> Any:
  """How bytes become numbers, by the means and deviations of colours."""
  for name, colours in vision.NORMS.items():
    wanted = [list(one[:channels]) for one in colours]
    default = vision.NORMS['imagenet']
    if wanted == [
      preparation.get(key, list(default[i])) for i, key in enumerate(_COLOURS)
    ]:
      return name
  raise config.refusal(
    'pretrained_cfg', f'of mean and std of {" or ".join(vision.NORMS)}'
  )


def _write(config: TransformerConfig) -> dict[str, Any]:
  sizes, side = config.sizes, config.image_size
  kind = 'cait' if config.class_layers else 'deit'
  shape = (config.embed_dim, config.num_layers, config.num_heads, side)
  names = [name for name in ARCHITECTURES if name.startswith(kind)]
  # Any of them will do, as the settings say all.
  name = next((one for one in names if ARCHITECTURES[one] == shape), names[0])
  ratio = sizes['mlp'] / config.embed_dim
  if int(config.embed_dim * ratio) != sizes['mlp']:
    ratio = (sizes['mlp'] + 0.5) / config.embed_dim
  settings = dict(
    zip(
      _KNOWN,
      (
        side,
        config.patch_size,
        config.image_channels,
        config.vocab_size,
        config.embed_dim,
        config.num_layers,
        config.num_heads,
        ratio,
      ),
      strict=True,
    )
  )
  if config.class_layers:
    gains = (config.class_layers, ratio, config.layer_scale)
    settings |= dict(zip(_OF_CAIT, gains, strict=True))
  return {
    'architecture': name,
    'num_classes': config.vocab_size,
    'num_features': config.embed_dim,
    'global_pool': 'token',
    'model_args': settings,
    'pretrained_cfg': {
      'num_classes': config.vocab_size,
      'input_size': [config.image_channels, side, side],
      'fixed_input_size': True,
      'first_conv': 'patch_embed.proj',
      'classifier': 'head',
      **_colours(config),
    },
  }


def _colours(config: TransformerConfig) -> dict[str, list[float]]:
  found = vision.NORMS[config.image_norm]
  return {
    key: list(one[: config.image_channels])
    for key, one in zip(_COLOURS, found, strict=True)
  }


def _linear(tensor: str, leaf: str) -> tuple[rules.Rule, ...]:
  return (
    rules.Rule(f'{tensor}.weight', f'{leaf}/kernel', 'transposed'),
    rules.Rule(f'{tensor}.bias', f'{leaf}/bias'),
  )


def _norms(tensor: str, leaf: str) -> tuple[rules.Rule, ...]:
  return (
    rules.Rule(f'{tensor}.weight', f'{leaf}/scale'),
    rules.Rule(f'{tensor}.bias', f'{leaf}/bias'),
  )


def _fused(tensor: str, leaf: str) -> list[rules.Rule]:
  made = []
  for number, name in enumerate(('query', 'key', 'value')):
    path, part = f'{leaf}/{name}', (number, 3)
    made += [
      rules.Rule(f'{tensor}.weight', f'{path}/kernel', 'transposed', part),
      rules.Rule(f'{tensor}.bias', f'{path}/bias', part=part),
    ]
  return made


def _block(tensor: str, leaf: str) -> tuple[rules.Rule, ...]:
  """What all layers have, but for queries, keys and values."""
  return (
    *_norms(f'{tensor}.norm1', f'{leaf}/attention_norm'),
    *_linear(f'{tensor}.attn.proj', f'{leaf}/attention/out'),
    *_norms(f'{tensor}.norm2', f'{leaf}/mlp_norm'),
    *_linear(f'{tensor}.mlp.fc1', f'{leaf}/mlp/up'),
    *_linear(f'{tensor}.mlp.fc2', f'{leaf}/mlp/down'),
    rules.Rule(f'{tensor}.gamma_1', f'{leaf}/attention_gain/scale'),
    rules.Rule(f'{tensor}.gamma_2', f'{leaf}/mlp_gain/scale'),
  )


_LAYER, _CLASS = 'blocks.{layer}', 'blocks_token_only.{layer}'
# DeiT has no gains, heads that talk and layers of the class token: rules that a
# model has no parameter for are left out.
_TABLE = (
  rules.Rule('cls_token', 'embedding/class_token', num_ones=2),
  rules.Rule('pos_embed', 'embedding/positions', num_ones=1),
  rules.Rule('patch_embed.proj.weight', 'embedding/patches/kernel', 'patches'),
  rules.Rule('patch_embed.proj.bias', 'embedding/patches/bias'),
  *_block(_LAYER, 'layers'),
  *_fused(f'{_LAYER}.attn.qkv', 'layers/attention'),
  *_linear(f'{_LAYER}.attn.proj_l', 'layers/attention/mix_logits'),
  *_linear(f'{_LAYER}.attn.proj_w', 'layers/attention/mix_weights'),
  *_block(_CLASS, 'class_layers'),
  *_linear(f'{_CLASS}.attn.q', 'class_layers/attention/query'),
  *_linear(f'{_CLASS}.attn.k', 'class_layers/attention/key'),
  *_linear(f'{_CLASS}.attn.v', 'class_layers/attention/value'),
  *_norms('norm', 'final_norm'),
  *_linear('head', 'head'),
)

DEIT, CAIT = (
  family.Family(
    model_type=name,
    library='timm',
    prefix='',
    architectures=(),
    read=_read,
    write=_write,
    table=_TABLE,
  )
  for name in ('deit', 'cait')
)
