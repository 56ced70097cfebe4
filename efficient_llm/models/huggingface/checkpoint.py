"""A checkpoint of transformers, opened: what model it is, and its parameters.

Opening reads headers. A parameter is read when it is asked for, the slice of
each device by itself and in pieces, so that the host never holds the model.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from efficient_llm.models import transformer
from efficient_llm.models.config import TransformerConfig
from efficient_llm.models.huggingface import (
  families,
  family,
  rules,
  safetensors_file,
  shards,
)
from efficient_llm.typing import Params

# What is read at once, before it is put where it belongs.
_PIECE_BYTES = 32 << 20
# XLA on a CPU takes arrays over without a copy where they begin at a multiple.
_ALIGNMENT = 64
_MAX_LISTED = 12


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """One checkpoint.

  Attributes:
    folder: Where it is.
    family: Of its model.
    model: As settings of the stack, in float32.
    document: Its config.json.
    tensors: By the names of the family's table.
    placed: The rules for this model, by parameter.
  """

  folder: pathlib.Path
  family: family.Family
  model: TransformerConfig
  document: Mapping[str, Any]
  tensors: Mapping[str, shards.Tensor]
  placed: Mapping[str, rules.Placed]

  @property
  def dtype(self) -> str:
    """Of the weights, as safetensors spells it; the widest if they differ."""
    found = {tensor.dtype for tensor in self.tensors.values()}
    return found.pop() if len(found) == 1 else 'F32'

  @functools.cached_property
  def digest(self) -> str:
    """Hash of its files: the same for copies of it, else different."""
    digest = hashlib.blake2b(digest_size=16)
    for path in shards.files(self.tensors):
      with path.open('rb') as file:
        digest.update(hashlib.file_digest(file, 'blake2b').digest())
    return digest.hexdigest()

  def read(self, abstract_params: Params | None = None) -> Params:
    """Reads the parameters, as float32.

    Args:
      abstract_params: Shapes and shardings to come back with; numpy arrays
        where there is no sharding, or for None.
    Raises:
      ValueError: If these are another model's, or a file ends early.
    """
    own = rules.flatten(transformer.abstract_params(self.model))
    wanted = own
    if abstract_params is not None:
      wanted = rules.flatten(abstract_params)
    if wrong := sorted(set(own) ^ set(wanted)):
      raise ValueError(
        f'{self.folder} must hold the wanted parameters; they differ in '
        f'{wrong[0]}; choose another checkpoint.'
      )
    read = {}
    for path, leaf in wanted.items():
      if (leaf.shape, leaf.dtype) != (own[path].shape, own[path].dtype):
        raise ValueError(
          f'{path} of {self.folder} is {own[path].dtype}{own[path].shape}, '
          f'{leaf.dtype}{leaf.shape} is wanted; choose another checkpoint.'
        )
      fill = functools.partial(self._slice, path, leaf.shape)
      sharding = getattr(leaf, 'sharding', None)
      if sharding is None:
        read[path] = fill((slice(None),) * len(leaf.shape))
      else:
        # One after the other, so that pieces do not add up.
        read[path] = jax.block_until_ready(
          jax.make_array_from_callback(leaf.shape, sharding, fill)
        )
    return rules.nest(read)

  def open_param(self, path: str) -> Callable[[int | None], np.ndarray]:
    """A function that reads one parameter, or a layer of it, as float32.

    Args:
      path: As `rules.flatten` names it.
    """
    placed = self.placed[path]
    shape = rules.flatten(transformer.abstract_params(self.model))[path].shape

    def read(layer: int | None) -> np.ndarray:
      if placed.num_layers is None or layer is None:
        return self._slice(path, shape, (slice(None),) * len(shape))
      index = (slice(layer, layer + 1), *[slice(None)] * (len(shape) - 1))
      return self._slice(path, shape, index)[0]

    return read

  def _slice(self, path: str, shape: tuple[int, ...], index: Any) -> np.ndarray:
    """A slice of a parameter, in memory that XLA can take over."""
    placed = self.placed[path]
    bounds = [
      slice(*one.indices(size)[:2])
      for one, size in zip(index, shape, strict=True)
    ]
    values = _aligned(tuple(one.stop - one.start for one in bounds))
    if placed.num_layers is None:
      self._fill(values, placed, placed.rule.tensor, bounds)
      return values
    for row, layer in enumerate(range(bounds[0].start, bounds[0].stop)):
      self._fill(values[row], placed, placed.name(layer), bounds[1:])
    return values

  def _fill(
    self,
    values: np.ndarray,
    placed: rules.Placed,
    name: str,
    index: Sequence[slice],
  ) -> None:
    """Reads a slice of one tensor into `values`, piece by piece."""
    tensor = self.tensors[name].without_ones(placed.rule.num_ones)
    view = placed.view
    first, *rest = placed.cut(index)
    values = placed.as_stored(values)
    if isinstance(first, int):
      values, first = values[None], slice(first, first + 1)
    rows = tensor.shape[0] // view[0]
    one_bytes = max(tensor.entry.num_bytes // view[0], 1)
    step = max(_PIECE_BYTES // one_bytes, 1)
    for start in range(first.start, first.stop, step):
      stop = min(start + step, first.stop)
      piece = tensor.read(start * rows, stop * rows)
      piece = piece.reshape(stop - start, *view[1:])
      place = slice(start - first.start, stop - first.start)
      values[place] = piece[(slice(None), *rest)]


def open_checkpoint(folder: str | pathlib.Path) -> Checkpoint:
  """Opens a folder that transformers' save_pretrained wrote.

  Args:
    folder: With config.json and safetensors.
  Raises:
    ValueError: If it is damaged, the stack has no such model, or its tensors
      are not that model's; names them.
  """
  folder = pathlib.Path(folder).absolute()
  if not folder.is_dir():
    raise ValueError(f'{folder} must be a folder; choose another.')
  of, model, document = families.read(folder)
  placed = families.place(of, model)
  tensors = _by_current_name(folder, of, shards.open_folder(folder))
  wanted = rules.shapes(placed)
  tensors = _without_copies(folder, of, tensors, wanted)
  _check(folder, tensors, wanted)
  return Checkpoint(folder, of, model, document, tensors, placed)


def _by_current_name(
  folder: pathlib.Path, of: family.Family, tensors: dict[str, shards.Tensor]
) -> dict[str, shards.Tensor]:
  found: dict[str, shards.Tensor] = {}
  for name, tensor in tensors.items():
    current = of.current_name(name)
    if current is None:
      continue
    if current in found:
      raise ValueError(
        f'{folder} must hold {safetensors_file.spell(current)} once, under one '
        'name; leave one out.'
      )
    found[current] = tensor
  return found


def _without_copies(
  folder: pathlib.Path,
  of: family.Family,
  tensors: dict[str, shards.Tensor],
  wanted: Mapping[str, Any],
) -> dict[str, shards.Tensor]:
  """Leaves out what only repeats another tensor, after a look."""
  repeated = {**of.copies, **of.tied}
  kept = dict(tensors)
  for name, original in repeated.items():
    if name not in kept or name in wanted or original not in kept:
      continue
    if not _are_same(kept[name], kept[original]):
      raise ValueError(
        f'{name} of {folder} must repeat {original}, as config.json says, and '
        'does not; set tie_word_embeddings to false there if that is meant.'
      )
    del kept[name]
  return kept


def _are_same(one: shards.Tensor, other: shards.Tensor) -> bool:
  if (one.shape, one.dtype) != (other.shape, other.dtype):
    return False
  if one.dtype not in safetensors_file.WEIGHT_DTYPES or not one.shape:
    return False
  rows = one.shape[0]
  step = max(_PIECE_BYTES * rows // max(one.entry.num_bytes, 1), 1)
  return all(
    np.array_equal(
      one.read(start, min(start + step, rows)).view(np.uint8),
      other.read(start, min(start + step, rows)).view(np.uint8),
    )
    for start in range(0, rows, step)
  )


def _check(
  folder: pathlib.Path,
  tensors: Mapping[str, shards.Tensor],
  wanted: Mapping[str, tuple[int, ...]],
) -> None:
  """Refuses tensors that are not the model's, by name."""
  spell = safetensors_file.spell
  dtypes = ', '.join(safetensors_file.WEIGHT_DTYPES)
  wrong = [
    f'{name} {list(shape)} is missing'
    for name, shape in wanted.items()
    if name not in tensors
  ]
  for name, tensor in tensors.items():
    if name not in wanted:
      wrong.append(f'{spell(name)} {spell(list(tensor.shape))} is unknown')
    elif tensor.shape != wanted[name]:
      wrong.append(
        f'{name} is {spell(list(tensor.shape))}, {list(wanted[name])} expected'
      )
    elif tensor.dtype not in safetensors_file.WEIGHT_DTYPES:
      wrong.append(f'{name} is {tensor.dtype}, one of {dtypes} expected')
  if not wrong:
    return
  listed = '; '.join(wrong[:_MAX_LISTED])
  if len(wrong) > _MAX_LISTED:
    listed += f'; and {len(wrong) - _MAX_LISTED} more'
  raise ValueError(
    f'{folder} must hold the tensors of its config.json: {listed}; mend '
    'config.json or choose another.'
  )


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
  """An empty float32 array that begins where XLA likes it."""
  num_bytes = int(np.prod(shape)) * 4
  raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
  start = -raw.ctypes.data % _ALIGNMENT
  return raw[start : start + num_bytes].view(np.float32).reshape(shape)
