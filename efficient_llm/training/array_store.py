"""Orbax, as far as checkpoints use it: named arrays in and out of a folder."""

import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from efficient_llm.training import manifest, step_folders, tree_names

# How long one process waits for the others to finish writing.
_BARRIER_SECS = 600


class Writer:
  """Writes arrays in the background, every process its own part."""

  def __init__(self) -> None:
    self._orbax = ocp.AsyncCheckpointer(
      _handler(),
      async_options=ocp.options.AsyncOptions(timeout_secs=_BARRIER_SECS),
    )

  def start(self, folder: pathlib.Path, leaves: Mapping[str, Any]) -> None:
    """Begins to write a step; its arrays may be donated once this returns."""
    stored = {name: a for name, a in leaves.items() if not _is_empty(a)}
    self._orbax.save(
      folder / step_folders.ARRAYS,
      args=ocp.args.PyTreeSave(tree_names.nest(stored)),
    )

  def wait(self) -> None:
    """Blocks until all processes have written; raises what failed."""
    self._orbax.wait_until_finished()

  def close(self) -> None:
    """Ends the background work."""
    self._orbax.close()


def load(
  folder: pathlib.Path,
  wanted: Mapping[str, Any],
  *,
  saved: Iterable[manifest.Leaf],
) -> dict[str, Any]:
  """Reads the wanted arrays of a verified step.

  Args:
    folder: The step's folder.
    wanted: By name, the shape, dtype and sharding to come back with; numpy
      arrays where there is no sharding.
    saved: What the manifest says of the same arrays.

  Raises:
    CheckpointError: If they cannot be read onto these devices.
    ValueError: If the wanted arrays are not the saved ones.
  """
  tree_names.check_same(
    saved, tree_names.describe(wanted), origin=f'checkpoint {folder}'
  )
  for name, leaf in wanted.items():
    kept = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if _sharding(leaf) and kept != leaf.dtype:
      raise ValueError(
        f'leaf {name} of {leaf.dtype} must not be narrowed; set '
        'jax_enable_x64 or leave out its sharding.'
      )
  try:
    return _read(folder / step_folders.ARRAYS, wanted)
  except step_folders.FAILURES as error:
    raise step_folders.CheckpointError(
      f'checkpoint {folder} could not be read: {step_folders.one_line(error)}; '
      'check the mesh and the memory.'
    ) from error


def _read(folder: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
  loaded = {name: _zeros(a) for name, a in wanted.items() if _is_empty(a)}
  stored = {name: a for name, a in wanted.items() if not _is_empty(a)}
  if stored:
    shapes = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      for name, leaf in stored.items()
    }
    how = {name: _restore_args(leaf) for name, leaf in stored.items()}
    with ocp.Checkpointer(_handler()) as reader:
      tree = reader.restore(
        folder,
        args=ocp.args.PyTreeRestore(
          item=tree_names.nest(shapes),
          restore_args=tree_names.nest(how),
          partial_restore=True,
        ),
      )
    loaded |= tree_names.named(tree)
  return loaded


def open_leaf(
  folder: pathlib.Path, leaf: manifest.Leaf
) -> Callable[[int | None], np.ndarray]:
  """Opens one array of a verified step, to be read row by row.

  What is read of the file is kept as long as the function that comes back.

  Args:
    folder: The step's folder.
    leaf: As its manifest has it.
  Returns:
    A function that reads a row of the first axis, or for None all.
  """
  if _is_empty(leaf):
    empty = np.zeros(leaf.shape, leaf.dtype)
    return lambda row: empty if row is None else empty[row]
  num_bytes = math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
  store = tensorstore.open(
    {
      'driver': 'zarr3',
      'kvstore': {
        'driver': 'ocdbt',
        'base': f'file://{folder / step_folders.ARRAYS}/',
        'path': f'{leaf.path.replace("/", ".")}/',
      },
      # Nobody changes a finished step.
      'recheck_cached_data': False,
    },
    read=True,
    open=True,
    # Rows lie in common chunks, which else would be read for every row.
    context=tensorstore.Context(
      {'cache_pool': {'total_bytes_limit': 2 * num_bytes}}
    ),
  ).result()

  def read(row: int | None) -> np.ndarray:
    part = store if row is None else store[row]
    return np.asarray(part.read().result())

  return read


def _handler() -> ocp.PyTreeCheckpointHandler:
  # Compressing trained weights costs most of a save and spares a tenth.
  return ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
  return getattr(leaf, 'sharding', None)


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
  if sharding := _sharding(leaf):
    return ocp.ArrayRestoreArgs(
      sharding=sharding, global_shape=tuple(leaf.shape), dtype=leaf.dtype
    )
  return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)


def _is_empty(leaf: Any) -> bool:
  """Whether an array has no elements, which Orbax cannot store."""
  return 0 in leaf.shape


def _zeros(leaf: Any) -> jax.Array | np.ndarray:
  if sharding := _sharding(leaf):
    return jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
  return np.zeros(leaf.shape, leaf.dtype)
