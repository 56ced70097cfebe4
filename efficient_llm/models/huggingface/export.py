"""Writes a model as transformers or timm stores it."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
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
# Opens a parameter by its path; what comes back reads it, or a layer of it.
Open = Callable[[str], Callable[[int | None], Any]]


def write(
  folder: str | pathlib.Path,
  config: TransformerConfig,
  params: Params | Open,
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
    params: Its parameters, jax or numpy arrays; or what opens them one by one,
      so that no more than one or a few are in memory.
    family: Name of its family; by default the one that has such models.
    dtype: Of the stored weights.
    document: A config.json whose other keys are kept.
    max_shard_bytes: Of one file's tensors.
  Raises:
    ValueError: If no family has such a model, a weight does not fit the dtype,
      or the folder holds a checkpoint.
  """
  config, opener = _with_token_types(config, _opener(params))
  of = families.FAMILIES[families.choose(config, name=family)]
  write_checkpoint(
    folder,
    families.place(of, config),
    opener,
    families.write(config, of, dtype=dtype, base=document),
    dtype=dtype,
    max_shard_bytes=max_shard_bytes,
  )


def write_checkpoint(
  folder: str | pathlib.Path,
  placed: Mapping[str, rules.Placed],
  params: Params | Open,
  document: Mapping[str, Any],
  *,
  dtype: Dtype = 'float32',
  max_shard_bytes: int = shards.MAX_SHARD_BYTES,
) -> None:
  """Writes parameters under the names of a table, and what describes them.

  Args:
    folder: New, or without a checkpoint in it.
    placed: From `rules.place`.
    params: As of `write`.
    document: Becomes config.json.
    dtype: Of the stored weights.
    max_shard_bytes: Of one file's tensors.
  Raises:
    ValueError: If a weight does not fit the dtype, or the folder holds a
      checkpoint.
  """
  folder = pathlib.Path(folder).absolute()
  if dtype not in DTYPES:
    raise ValueError(
      f'{dtype=} must be one of {", ".join(DTYPES)}; choose one.'
    )
  check_folder(folder)
  folder.mkdir(parents=True, exist_ok=True)
  make = functools.partial(_make, placed, _Opened(_opener(params)), dtype)
  stored = {
    name: (DTYPES[dtype], shape) for name, shape in rules.shapes(placed).items()
  }
  shards.write_folder(
    folder,
    stored,
    functools.partial(make, rules.makers(placed)),
    max_shard_bytes=max_shard_bytes,
  )
  # Last, as a folder without it is no checkpoint.
  (folder / families.CONFIG).write_text(
    json.dumps(dict(document), indent=2, sort_keys=True) + '\n',
    encoding='utf-8',
  )


class _Opened:
  """The parameters of the tensor that is being written, and no others."""

  def __init__(self, opener: Open) -> None:
    self._opener = opener
    self._opened: dict[str, Callable[[int | None], Any]] = {}

  def keep(self, paths: Iterable[str]) -> None:
    """Lets go of all others."""
    kept = {path: self._opened.get(path) for path in paths}
    # Before new ones are opened.
    self._opened.clear()
    for path, read in kept.items():
      self._opened[path] = read or self._opener(path)

  def read(self, path: str, layer: int | None) -> np.ndarray:
    return np.asarray(jax.device_get(self._opened[path](layer)), np.float32)


def _make(
  placed: Mapping[str, rules.Placed],
  opened: _Opened,
  dtype: Dtype,
  makers: Mapping[str, list[tuple[str, int | None]]],
  name: str,
) -> np.ndarray:
  """One tensor, of the parameters that it holds."""
  opened.keep(path for path, _ in makers[name])
  (path, layer), *more = makers[name]
  one = placed[path]
  if not more:
    # Seen in the tensor's order; copied when it is written, if at all.
    whole = one.as_stored(np.ascontiguousarray(opened.read(path, layer)))
  else:
    whole = np.empty(one.view, np.float32)
    for path, layer in makers[name]:
      value = np.ascontiguousarray(opened.read(path, layer))
      cut = placed[path].cut((slice(None),) * value.ndim)
      whole[cut] = placed[path].as_stored(value)
  if dtype == 'float32':
    return whole.reshape(one.shape)
  # What overflows is named below.
  with np.errstate(over='ignore'):
    tensor = whole.astype(safetensors_file.WEIGHT_DTYPES[DTYPES[dtype]])
  if np.isfinite(whole).sum() != np.isfinite(tensor).sum():
    raise ValueError(
      f'{name} holds a number too large for {dtype}; choose another dtype.'
    )
  return tensor.reshape(one.shape)


def _opener(params: Params | Open) -> Open:
  """What opens parameters that are in memory anyway, or what is given."""
  if callable(params):
    return params
  leaves = rules.flatten(params)

  def open_param(path: str) -> Callable[[int | None], Any]:
    leaf = leaves[path]
    return lambda layer: leaf if layer is None else leaf[layer]

  return open_param


def check_folder(folder: pathlib.Path) -> None:
  """Raises ValueError if a folder holds a checkpoint already."""
  there = [families.CONFIG, shards.SINGLE, shards.INDEX]
  for name in there:
    if (folder / name).exists():
      raise ValueError(
        f'{folder} must be new, holds {name}; choose another or remove it.'
      )


def _with_token_types(
  config: TransformerConfig, opener: Open
) -> tuple[TransformerConfig, Open]:
  """BERT's names need a table of token types: one row that adds nothing."""
  if config.causal or config.num_token_types or config.reads_images:
    return config, opener
  zeros = np.zeros((1, config.embed_dim), np.float32)

  def open_param(path: str) -> Callable[[int | None], Any]:
    if path == 'embedding/token_types':
      return lambda _: zeros
    return opener(path)

  return dataclasses.replace(config, num_token_types=1), open_param
