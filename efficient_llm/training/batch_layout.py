"""Where the rows of a batch lie: on devices, and in processes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from efficient_llm import sharding
from efficient_llm.data import config as data_config


def check_batch_size(
  batch_size: int, batch_sharding: NamedSharding, *, num_microbatches: int
) -> None:
  """Refuses a batch whose microbatches the devices cannot share evenly.

  Raises:
    ValueError: With the next legal size.
  """
  num_parts = sharding.num_shards(batch_sharding.mesh, batch_sharding.spec[0])
  multiple = num_parts * num_microbatches
  if batch_size % multiple:
    raise ValueError(
      f'data.batch_size={batch_size} must be divisible by the {num_parts} '
      'devices of mesh axes data and fsdp, times loop.num_microbatches='
      f'{num_microbatches}; set '
      f'--config.data.batch_size={-(-batch_size // multiple) * multiple}.'
    )


def process_share(
  batch_sharding: NamedSharding, batch_size: int
) -> tuple[int, int]:
  """Which rows of a batch this process loads: a stretch and their number.

  Processes that hold the same rows, as with tensor parallelism between them,
  have the same share.

  Raises:
    ValueError: If a process holds rows that are not one such stretch.
  """
  index_map = batch_sharding.devices_indices_map((batch_size,))
  held: dict[int, set[tuple[int, int]]] = {}
  for device, (rows,) in index_map.items():
    first, end, _ = rows.indices(batch_size)
    held.setdefault(device.process_index, set()).add((first, end))
  return _share_of_rows(held)


def island_share(
  batch_sharding: NamedSharding, *, num_islands: int, batch_size: int
) -> tuple[range, tuple[int, int]]:
  """The islands this process loads rows for, and its share of their rows.

  Args:
    batch_sharding: Of a batch [M, B, ...].
    num_islands: M.
    batch_size: B.

  Raises:
    ValueError: If a process holds islands, or rows, that do not follow each
      other.
  """
  index_map = batch_sharding.devices_indices_map((num_islands, batch_size))
  places = [
    (device.process_index, *islands.indices(num_islands)[:2], rows)
    for device, (islands, rows) in index_map.items()
  ]
  mine = {
    (first, end)
    for process, first, end, _ in places
    if process == jax.process_index()
  }
  start, stop = min(mine)[0], max(mine)[1]
  if sum(end - first for first, end in mine) != stop - start:
    raise ValueError(
      'the mesh must give every process islands that follow each other; let '
      'mesh.fsdp and mesh.tensor divide the devices of a process.'
    )
  held: dict[int, set[tuple[int, int]]] = {}
  for process, first, end, rows in places:
    if (first, end) in mine:
      stretch = rows.indices(batch_size)[:2]
      held.setdefault(process, set()).add(stretch)
  return range(start, stop), _share_of_rows(held)


def _share_of_rows(held: dict[int, set[tuple[int, int]]]) -> tuple[int, int]:
  """This process's place among the stretches of rows that processes hold."""
  stretches = set()
  for parts in held.values():
    first, end = min(parts)[0], max(parts)[1]
    if sum(stop - start for start, stop in parts) != end - first:
      raise ValueError(
        'the mesh must give every process rows that follow each other; let '
        'mesh.tensor divide the devices of a process.'
      )
    stretches.add((first, end))
  mine = held[jax.process_index()]
  return sorted(stretches).index((min(mine)[0], max(mine)[1])), len(stretches)


def abstract_batch(
  config: data_config.DataConfig, batch_sharding: jax.sharding.Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape, dtype and sharding of everything in a batch."""
  is_images = config.objective == 'classes'
  length = 1 if is_images else config.sequence_length
  rows = (config.batch_size, length)
  found: dict[str, tuple[tuple[int, ...], Any]] = {
    'targets': (rows, jnp.int32),
    'loss_weights': (rows, jnp.float32),
  }
  if is_images:
    side = config.image_size or 0
    shape = (config.batch_size, side, side, config.image_channels)
    found['images'] = (shape, jnp.uint8)
  else:
    for name in ('tokens', 'segment_ids', 'positions'):
      found[name] = (rows, jnp.int32)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding)
    for name, (shape, dtype) in found.items()
  }
