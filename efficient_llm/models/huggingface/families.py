"""The families there are, and which one a model or a config.json is of."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from efficient_llm.models import transformer
from efficient_llm.models.config import TransformerConfig
from efficient_llm.models.huggingface import (
  bert,
  family,
  gpt2,
  llama,
  rules,
  shards,
  vision,
)

FAMILIES = {
  one.model_type: one
  for one in (
    gpt2.FAMILY,
    bert.BERT,
    bert.ROBERTA,
    llama.LLAMA,
    llama.QWEN2,
    llama.QWEN3,
    vision.DEIT,
    vision.CAIT,
  )
}
CONFIG = 'config.json'

# What does not decide about the weights or what is computed of them.
_FREE = (
  'init_std',
  'dtype',
  'remat',
  'scan_unroll',
  'attention_implementation',
)
# Compared as sizes, since None stands for a number.
_SIZES = ('num_kv_heads', 'head_dim', 'mlp_dim')


def read(
  folder: pathlib.Path,
) -> tuple[family.Family, TransformerConfig, dict[str, Any]]:
  """Reads config.json.

  Args:
    folder: Of a checkpoint.
  Returns:
    The family, the model as settings of the stack, and the document.
  Raises:
    ValueError: If the stack does not have such a model; names the key.
  """
  path = folder / CONFIG
  document = shards.read_json(path)
  return *parse(document, path=str(path)), document


def kind_of(document: Mapping[str, Any]) -> str | None:
  """What a config.json calls its family; timm has it before a size.

  Args:
    document: Of any content.
  """
  kind = document.get('model_type')
  if kind is None and isinstance(document.get('architecture'), str):
    return document['architecture'].partition('_')[0]
  return kind if isinstance(kind, str) else None


def parse(
  document: Mapping[str, Any], *, path: str
) -> tuple[family.Family, TransformerConfig]:
  """Takes a config.json apart; see `read`."""
  settings = family.Settings(document, path)
  kind = kind_of(document)
  if kind not in FAMILIES:
    key = 'model_type' if 'model_type' in document else 'architecture'
    raise settings.refusal(key, f'one of {", ".join(FAMILIES)}')
  found = FAMILIES[kind]
  if found.library == 'timm' and not isinstance(
    document.get('architecture'), str
  ):
    raise settings.refusal(
      'architecture', "one of timm's, as transformers has other names"
    )
  if document.get('quantization_config') is not None:
    raise settings.refusal('quantization_config', 'left out')
  if document.get('auto_map') is not None:
    raise settings.refusal('auto_map', 'left out, as no remote code is run')
  architecture = settings.architecture
  if architecture is not None and architecture not in found.architectures:
    raise settings.refusal(
      'architectures', f'one of {", ".join(found.architectures)}'
    )
  for key, allowed in found.refused.items():
    if document.get(key) is not None and document[key] not in allowed:
      raise settings.refusal(key, ' or '.join(map(repr, allowed)))
  model = found.read(settings)
  try:
    model.validate()
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  return found, model


def place(
  of: family.Family, config: TransformerConfig
) -> dict[str, rules.Placed]:
  """The rules of a family for a model; see `rules.place`."""
  side = config.patch_size or 0
  return rules.place(
    of.table,
    transformer.logical_axes(config),
    config.sizes,
    pixels=(side, side, config.image_channels),
  )


def choose(config: TransformerConfig, *, name: str | None = None) -> str:
  """The family whose models are such ones.

  Args:
    config: The model.
    name: Take this one or fail.
  Raises:
    ValueError: If no family has such a model; says what does not fit.
  """
  if name is None:
    name = _likely(config)
  if name not in FAMILIES:
    raise ValueError(
      f'family={name!r} must be one of {", ".join(FAMILIES)}; choose one.'
    )
  document = write(config, FAMILIES[name])
  back = parse(document, path=CONFIG)[1]
  for field in dataclasses.fields(config):
    ours, theirs = getattr(config, field.name), getattr(back, field.name)
    if ours != theirs and field.name not in _FREE + _SIZES:
      raise ValueError(
        f'model.{field.name} must be {theirs!r} in a model of the family '
        f'{name}, is {ours!r}; no family has such a model.'
      )
  for axis, size in config.sizes.items():
    if back.sizes[axis] != size:
      raise ValueError(
        f'The axis {axis} must be {back.sizes[axis]} long in such a model of '
        f'the family {name}, is {size}; no family has such a model.'
      )
  return name


def _likely(config: TransformerConfig) -> str:
  if config.reads_images:
    return 'cait' if config.class_layers else 'deit'
  if config.positions == 'rotary':
    if config.qk_norm:
      return 'qwen3'
    return 'qwen2' if config.qkv_bias and not config.bias else 'llama'
  if config.causal:
    return 'gpt2'
  return 'roberta' if config.position_offset else 'bert'


def write(
  config: TransformerConfig,
  of: family.Family,
  *,
  dtype: str = 'float32',
  base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """What config.json says of a model.

  Args:
    config: The model.
    of: Its family.
    dtype: Of the stored weights, as torch names it.
    base: A document whose other keys are kept.
  """
  if of.library == 'timm':
    return {**(base or {}), **of.write(config)}
  is_bare = not config.causal and not config.mlm_head
  architecture = of.architectures[1 if is_bare else 0]
  return {
    **(base or {}),
    'architectures': [architecture],
    'model_type': of.model_type,
    **of.write(config),
    'dtype': dtype,
    'torch_dtype': dtype,
  }
