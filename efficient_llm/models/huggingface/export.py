"""Writes a model as transformers stores it."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from efficient_llm.models.config import TransformerConfig
from efficient_llm.models.huggingface import (
  families,
  rules,
  safetensors_file,
  shards,
)
from efficient_llm.typing import Params

Dtype = Literal['float32', 'float16', 'bfloat16']
DTYPES: Mapping[str, str] = {
  'float32': 'F32',
  'float16': 'F16',
  'bfloat16': 'BF16',
}


def write(
  folder: str | pathlib.Path,
  config: TransformerConfig,
  params: Params,
  *,
  family: str | None = None,
  dtype: Dtype = 'float32',
  document: Mapping[str, Any] | None = None,
  max_shard_bytes: int = shards.MAX_SHARD_BYTES,
) -> None:
  """Writes config.json and safetensors, one tensor in memory at a time.

  Args:
    folder: New, or without a checkpoint in it.
    config: The model.
    params: Its parameters, jax or numpy arrays.
    family: Name of its family; by default the one that has such models.
    dtype: Of the stored weights.
    document: A config.json whose other keys are kept.
    max_shard_bytes: Of one file's tensors.
  Raises:
    ValueError: If no family has such a model, a weight does not fit the dtype,
      or the folder holds a checkpoint.
  """
  folder = pathlib.Path(folder).absolute()
  if dtype not in DTYPES:
    raise ValueError(
      f'{dtype=} must be one of {", ".join(DTYPES)}; choose one.'
    )
  config, params = _with_token_types(config, params)
  of = families.FAMILIES[families.choose(config, name=family)]
  placed = rules.place(of.table, config)
  check_folder(folder)
  folder.mkdir(parents=True, exist_ok=True)
  leaves = rules.flatten(params)
  makers: dict[str, list[tuple[str, int | None]]] = {}
  for path, one in placed.items():
    for layer, name in enumerate(one.tensors()):
      makers.setdefault(name, []).append(
        (path, None if one.num_layers is None else layer)
      )
  target = safetensors_file.WEIGHT_DTYPES[DTYPES[dtype]]

  def make(name: str) -> np.ndarray:
    view = placed[makers[name][0][0]].view
    whole = np.empty(view, np.float32)
    for path, layer in makers[name]:
      one = placed[path]
      leaf = leaves[path] if layer is None else leaves[path][layer]
      value = np.asarray(jax.device_get(leaf), np.float32)
      cut = one.cut((slice(None),) * value.ndim)
      whole[cut] = value.transpose(np.argsort(one.turn()))
    # What overflows is named below.
    with np.errstate(over='ignore'):
      tensor = whole.reshape(one.shape).astype(target)
    if not np.array_equal(
      np.isfinite(whole), np.isfinite(tensor).reshape(view)
    ):
      raise ValueError(
        f'{name} holds a number too large for {dtype}; choose another dtype.'
      )
    return tensor

  stored = {
    name: (DTYPES[dtype], shape) for name, shape in rules.shapes(placed).items()
  }
  shards.write_folder(folder, stored, make, max_shard_bytes=max_shard_bytes)
  # Last, as a folder without it is no checkpoint.
  text = families.write(config, of, dtype=dtype, base=document)
  (folder / families.CONFIG).write_text(
    json.dumps(text, indent=2, sort_keys=True) + '\n', encoding='utf-8'
  )


def check_folder(folder: pathlib.Path) -> None:
  """Raises ValueError if a folder holds a checkpoint already."""
  there = [families.CONFIG, shards.SINGLE, shards.INDEX]
  for name in there:
    if (folder / name).exists():
      raise ValueError(
        f'{folder} must be new, holds {name}; choose another or remove it.'
      )


def _with_token_types(
  config: TransformerConfig, params: Params
) -> tuple[TransformerConfig, Params]:
  """BERT's names need a table of token types: one row that adds nothing."""
  if config.causal or config.num_token_types:
    return config, params
  embedding = params['embedding']
  zeros = np.zeros((1, config.embed_dim), np.float32)
  return (
    dataclasses.replace(config, num_token_types=1),
    {**params, 'embedding': {**embedding, 'token_types': zeros}},
  )
