"""Bytes between devices, by kind of collective and mesh axis."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from efficient_llm.training import hlo

# Bytes a device sends per byte of its operand, for g devices, in a ring
# (Thakur et al. 2005, section 4; all-gather's operand is one part).
_BYTES_SENT: dict[str, Callable[[int], float]] = {
  'all-gather': lambda g: g - 1,
  'all-reduce': lambda g: 2 * (g - 1) / g,
  'reduce-scatter': lambda g: (g - 1) / g,
  'all-to-all': lambda g: (g - 1) / g,
  'ragged-all-to-all': lambda g: (g - 1) / g,
  'collective-permute': lambda g: 1,
  'collective-broadcast': lambda g: 1,
}


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind over the same mesh axes.

  Attributes:
    mesh_axes: Axes that the devices of a group differ in.
    count: How many run in a step.
    bytes_per_device_per_step: Sent by each device if all go round a ring.
    overlapped: Whether the compiler runs them beside other work.
    crosses_network: Whether they leave a slice or a host.
  """

  kind: str
  mesh_axes: tuple[str, ...]
  count: int
  bytes_per_device_per_step: int
  overlapped: bool
  crosses_network: bool


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the devices of a program stand.

  Attributes:
    axis_sizes: The mesh, axes in order.
    granules: Slice (TPU) or host (GPU) of each device, in mesh order.
  """

  axis_sizes: Mapping[str, int]
  granules: Sequence[int]

  def describe(self, groups: np.ndarray) -> tuple[tuple[str, ...], bool]:
    """Axes that the devices of a group differ in, and whether granules do."""
    if groups.size and groups.max() >= len(self.granules):
      return ('unknown',), False
    coordinates = np.unravel_index(groups, tuple(self.axis_sizes.values()))
    axes = tuple(
      name
      for name, values in zip(self.axis_sizes, coordinates, strict=True)
      if (values != values[:, :1]).any()
    )
    granules = np.asarray(self.granules)[groups]
    return axes, bool((granules != granules[:, :1]).any())


def collect(program: hlo.Program, layout: Layout) -> list[Collective]:
  """All collectives of a program, most bytes first.

  One that has a start, steps and an end counts once.
  """
  counts: dict[tuple[Any, ...], list[float]] = collections.defaultdict(
    lambda: [0, 0.0]
  )
  for where, instruction, times in program.executed():
    for inner, found, overlapped in _inside(program, where, instruction):
      if found.opcode == 'send':
        entry = _network_transfer(found, layout)
      else:
        entry = _collective(inner, found, layout)
      if entry is not None:
        kind, axes, sent, crosses = entry
        sums = counts[kind, axes, overlapped, crosses]
        sums[0] += times
        sums[1] += times * sent
  result = [
    Collective(
      kind=kind,
      mesh_axes=axes,
      count=int(count),
      bytes_per_device_per_step=round(sent),
      overlapped=overlapped,
      crosses_network=crosses,
    )
    for (kind, axes, overlapped, crosses), (count, sent) in counts.items()
  ]
  return sorted(result, key=lambda c: -c.bytes_per_device_per_step)


def _inside(
  program: hlo.Program,
  computation: hlo.Computation,
  instruction: hlo.Instruction,
  overlapped: bool = False,
) -> Iterator[tuple[hlo.Computation, hlo.Instruction, bool]]:
  """Collectives that an instruction is or that its fusion holds."""
  opcode = instruction.opcode
  if opcode == 'send':
    if '_xla_megascale_transfer_type' in instruction.attributes:
      yield computation, instruction, True
  elif opcode.removesuffix('-start') in _BYTES_SENT:
    waits = '"is_sync":true' in instruction.attributes
    beside = opcode.endswith('-start') and not waits
    yield computation, instruction, overlapped or beside
  elif opcode == 'fusion' and (callee := program.called(instruction)):
    targets = ' '.join(
      inner.attributes
      for inner in callee.instructions.values()
      if inner.opcode == 'custom-call'
    )
    starts = 'AsyncCollectiveStart' in targets
    # A TPU writes the same collective again where it goes on and ends.
    if not starts and (
      'AsyncCollectiveDone' in targets
      or callee.name.startswith('async_collective_fusion')
    ):
      return
    for inner in callee.instructions.values():
      yield from _inside(program, callee, inner, overlapped or starts)


def _collective(
  computation: hlo.Computation, instruction: hlo.Instruction, layout: Layout
) -> tuple[str, tuple[str, ...], float, bool] | None:
  kind = instruction.opcode.removesuffix('-start')
  # On TPU a reduce-scatter is an all-reduce of which one slice is kept.
  users = computation.users.get(instruction.name, ())
  if kind == 'all-reduce' and any(u.opcode == 'dynamic-slice' for u in users):
    kind = 'reduce-scatter'
  groups = device_groups(
    instruction.attributes, math.prod(layout.axis_sizes.values())
  )
  if groups is None or groups.shape[1] < 2:
    return None
  axes, crosses = layout.describe(groups)
  if not axes:
    return None  # A permutation that leaves everything where it is.
  operand_bytes = sum(
    hlo.num_bytes(computation.instructions[operand].shape)
    for operand in instruction.operands
    if operand in computation.instructions
  )
  return kind, axes, _BYTES_SENT[kind](groups.shape[1]) * operand_bytes, crosses


def _network_transfer(
  send: hlo.Instruction, layout: Layout
) -> tuple[str, tuple[str, ...], float, bool] | None:
  """A TPU's transfer between slices; its groups are one device of each."""
  found = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
  num_slices = len(set(layout.granules))
  if found is None or num_slices < 2:
    return None
  kind = found[1].lower().replace('_', '-')
  factor = _BYTES_SENT.get(kind, _BYTES_SENT['collective-permute'])(num_slices)
  sent = factor * hlo.num_bytes(hlo.elements(send.shape)[0])
  granules = np.reshape(layout.granules, tuple(layout.axis_sizes.values()))
  axes = tuple(
    name
    for axis, name in enumerate(layout.axis_sizes)
    if (granules != np.take(granules, [0], axis)).any()
  )
  return kind, axes, sent, True


def device_groups(attributes: str, num_devices: int) -> np.ndarray | None:
  """Groups of devices, [groups, members], as positions in the mesh.

  Reads the four ways they are written: lists, `[4,2]<=[2,4]T(1,0)`, named
  axes `mesh['a'=2,'b'=4] {'a'}`, and pairs of source and target.
  """
  mesh = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}',
    attributes,
  )
  if mesh:
    return _named_axes(*mesh.groups())
  iota = re.search(r'replica_groups=(\[[\d,]+\]<=\S*)', attributes)
  if iota:
    return _iota(iota[1])
  listed = re.search(
    r'(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}',
    attributes,
  )
  if listed is None:
    return None
  groups = [_numbers(group) for group in re.findall(r'\{([^}]*)\}', listed[1])]
  if not groups:
    return np.arange(num_devices)[None]
  return np.array(groups) if len({len(g) for g in groups}) == 1 else None


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r'\d+', text)]


def _iota(text: str) -> np.ndarray:
  """`[4,2]<=[2,4]T(1,0)`: count up, transpose, cut."""
  shape, _, order = text.partition('<=')
  sizes, _, axes = order.partition('T(')
  dims = _numbers(sizes)
  ids = np.arange(math.prod(dims)).reshape(dims)
  if axes:
    ids = ids.transpose(_numbers(axes.partition(')')[0]))
  return ids.reshape(_numbers(shape))


def _named_axes(mesh: str, ids: str | None, grouped: str) -> np.ndarray:
  """Groups along named axes of a mesh, or along a part of such an axis."""
  pairs = re.findall(r"'([^']+)'=(\d+)", mesh)
  sizes = {name: int(size) for name, size in pairs}
  num_devices = math.prod(sizes.values())
  if ids is None:
    order = np.arange(num_devices)
  elif ids.startswith('['):
    order = _iota(f'[{num_devices}]<={ids}')
  else:
    order = np.array(_numbers(ids))
  parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped)
  shape, along = [], []
  for name, size in sizes.items():
    inside = [
      (int(before or 1), int(length or size))
      for part, before, length in parts
      if part == name
    ]
    done = 1
    for before, length in sorted(inside):
      along.append(len(shape) + 1)
      shape += [before // done, length]
      done = before * length
    shape.append(size // done)
  order = order.reshape(shape)
  others = [axis for axis in range(len(shape)) if axis not in along]
  num_members = math.prod(shape[axis] for axis in along)
  return order.transpose([*others, *along]).reshape(-1, num_members)
