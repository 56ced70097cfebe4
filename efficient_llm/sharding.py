"""Device meshes and the rule table from logical axes to mesh axes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from efficient_llm import typing

MESH_AXES = ('island', 'data', 'fsdp', 'tensor')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How devices are laid out; one size may be -1: whatever devices are left.

  Attributes:
    island: Groups that hold their own copy of the parameters (DiLoCo).
    data: Groups that hold the same parameters and see other examples.
    fsdp: Devices that share parameters and see other examples.
    tensor: Devices that share every matrix product.
  """

  island: int = 1
  data: int = 1
  fsdp: int = -1
  tensor: int = 1

  def validate(self) -> None:
    sizes = dataclasses.astuple(self)
    if sum(size == -1 for size in sizes) > 1:
      raise ValueError(f'At most one mesh axis may be -1, got {self}; set one.')
    for name, size in zip(MESH_AXES, sizes, strict=True):
      if size < 1 and size != -1:
        raise ValueError(
          f'mesh.{name}={size} must be a positive number or -1 (the rest).'
        )

  def sizes(self, num_devices: int) -> tuple[int, ...]:
    """Mesh shape for this many devices.

    Args:
      num_devices: All devices of the mesh.
    Raises:
      ValueError: If the sizes do not multiply to `num_devices`.
    """
    self.validate()
    sizes = dataclasses.astuple(self)
    fixed = math.prod(size for size in sizes if size != -1)
    if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
      raise ValueError(
        f'mesh sizes {dict(zip(MESH_AXES, sizes, strict=True))} must multiply '
        f'to {num_devices=}; set one of them to -1.'
      )
    return tuple(num_devices // fixed if s == -1 else s for s in sizes)


def make_mesh(
  config: MeshConfig, *, devices: Sequence[Any] | None = None
) -> Mesh:
  """Builds the mesh; islands (or data groups) go across slices first.

  Args:
    config: Axis sizes.
    devices: Devices to use, also compile-only ones; all devices by default.
  Raises:
    ValueError: If the sizes fit neither the devices nor their slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = config.sizes(len(devices))
  axis_types = (AxisType.Auto,) * len(MESH_AXES)
  num_slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if devices[0].platform != 'tpu':
    # Devices of one process stay next to each other, processes outermost.
    array = np.asarray(devices, dtype=object).reshape(sizes)
  elif num_slices > 1:
    array = _multi_slice(devices, sizes, num_slices)
  else:
    return jax.make_mesh(
      sizes, MESH_AXES, devices=devices, axis_types=axis_types
    )
  return Mesh(array, MESH_AXES, axis_types=axis_types)


def _multi_slice(
  devices: Sequence[Any], sizes: tuple[int, ...], num_slices: int
) -> np.ndarray:
  """Puts the slow network between islands, else between data groups."""
  from jax.experimental import mesh_utils

  for position, size in enumerate(sizes[:3]):
    if size % num_slices == 0:
      across = tuple(
        num_slices if i == position else 1 for i in range(len(sizes))
      )
      within = tuple(s // a for s, a in zip(sizes, across, strict=True))
      return mesh_utils.create_hybrid_device_mesh(
        within,
        across,
        devices=devices,
        # As one slice allows: tensor=2 on a 4x4 torus, say.
        allow_split_physical_axes=True,
      )
  raise ValueError(
    f'{num_slices=} must divide mesh.island, mesh.data or mesh.fsdp, got '
    f'{sizes}; set mesh.data={num_slices}.'
  )


MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AxisRules:
  """The rule table: which mesh axes share each logical axis."""

  table: Mapping[str, MeshAxes]

  def spec(
    self, names: Sequence[str | None], mesh_axes: Sequence[str]
  ) -> PartitionSpec:
    """PartitionSpec for named dimensions; a mesh axis is used only once.

    Args:
      names: One per dimension; None leaves it whole.
      mesh_axes: Those of the mesh; rules about others do not apply.
    """
    used: set[str] = set()
    entries = []
    for name in names:
      axes = tuple(
        axis
        for axis in self.table.get(name or '', ())
        if axis in mesh_axes and axis not in used
      )
      used.update(axes)
      entries.append(axes if len(axes) != 1 else axes[0])
    return PartitionSpec(*(entry or None for entry in entries))


DEFAULT_RULES = AxisRules(
  {
    'island': ('island',),
    'batch': ('data', 'fsdp'),
    'embed': ('fsdp',),
    'mlp': ('tensor',),
    'heads': ('tensor',),
    'kv_heads': ('tensor',),
    'vocab': ('tensor',),
  }
)


def param_shardings(
  mesh: Mesh | AbstractMesh,
  axes: typing.PyTree,
  shapes: typing.PyTree,
  *,
  rules: AxisRules = DEFAULT_RULES,
) -> typing.PyTree:
  """A NamedSharding for every parameter.

  Args:
    mesh: The device mesh.
    axes: Tree of LogicalAxes.
    shapes: Tree of the same structure with `.shape` leaves.
    rules: The rule table.
  Raises:
    ValueError: If a dimension is not divisible by its mesh axes; names the
      leaf and the next legal size.
  """

  def one(path: Any, leaf_axes: typing.LogicalAxes, leaf: Any) -> NamedSharding:
    spec = rules.spec(leaf_axes.names, mesh.axis_names)
    for name, size, entry in zip(
      leaf_axes.names, leaf.shape, spec, strict=False
    ):
      parts = num_shards(mesh, entry)
      if size % parts:
        raise ValueError(
          f'{jax.tree_util.keystr(path, simple=True, separator="/")}: axis '
          f'{name}={size} must be divisible by mesh axis {entry}={parts}; the '
          f'next legal size is {-(-size // parts) * parts}.'
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, axes, shapes)


def num_shards(
  mesh: Mesh | AbstractMesh, entry: str | Sequence[str] | None
) -> int:
  """How many parts a PartitionSpec entry cuts a dimension into."""
  if entry is None:
    return 1
  names = (entry,) if isinstance(entry, str) else entry
  return math.prod(mesh.shape[name] for name in names)


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(
  mesh: Mesh | AbstractMesh, *, rules: AxisRules = DEFAULT_RULES
) -> NamedSharding:
  """Sharding of a [batch, ...] array: rows over the data and fsdp axes."""
  return NamedSharding(mesh, rules.spec(('batch',), mesh.axis_names))


def check_batch_size(mesh: Mesh | AbstractMesh, batch_size: int) -> None:
  """Refuses a batch that the mesh cannot share evenly.

  Raises:
    ValueError: With the next legal size.
  """
  spec = batch_sharding(mesh).spec
  parts = num_shards(mesh, spec[0])
  if batch_size % parts:
    raise ValueError(
      f'data.{batch_size=} must be divisible by the {parts} devices of mesh '
      f'axes {spec[0]}; set data.batch_size={-(-batch_size // parts) * parts}.'
    )


def constrain(
  x: jax.Array,
  names: Sequence[str | None],
  *,
  rules: AxisRules = DEFAULT_RULES,
) -> jax.Array:
  """Shards an activation by its axis names; nothing outside `jax.set_mesh`.

  Args:
    x: The activation.
    names: One per dimension; None leaves it whole.
    rules: The rule table.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  spec = divisible_spec(x.shape, names, mesh, rules=rules)
  return jax.lax.with_sharding_constraint(x, spec)


def divisible_spec(
  shape: Sequence[int],
  names: Sequence[str | None],
  mesh: Mesh | AbstractMesh,
  *,
  rules: AxisRules = DEFAULT_RULES,
) -> PartitionSpec:
  """The rules' spec, without the entries that do not divide their dimension.

  A single prompt cannot be shared by eight devices: it is left whole.

  Args:
    shape: Of the array.
    names: One per dimension.
    mesh: The device mesh.
    rules: The rule table.
  """
  spec = rules.spec(names, mesh.axis_names)
  return PartitionSpec(
    *(
      entry if size % num_shards(mesh, entry) == 0 else None
      for size, entry in zip(shape, spec, strict=True)
    )
  )


def to_global(batch: typing.Batch, sharding: NamedSharding) -> typing.Batch:
  """Makes global arrays of this process's rows.

  Args:
    batch: Rows of this process.
    sharding: Of the rows of all processes.
  """
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
    for name, rows in batch.items()
  }
