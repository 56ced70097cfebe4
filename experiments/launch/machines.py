"""The machines of a batch run by name: 'v5e:4x4,slices=4', 'h100:8x2'."""

import dataclasses
import math
import re
from typing import Literal

from efficient_llm.training import topology

SYNTAX = (
  "v5e:4x4, v6e:4x4 or v5p:4x4x4 (chips along each axis), with ',slices=2' for "
  'several slices; h100:8x2 (GPUs in a node x nodes), also h200, a100 or gpu '
  'for any; cpu:1x2 (1 x nodes)'
)

_GPUS = ('h100', 'h200', 'a100', 'gpu')
# Shapes that can be ordered; one host drives up to eight chips of these.
_FLAT_SHAPES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True)
class Machines:
  """What a batch run asks for.

  Attributes:
    platform: What JAX calls it.
    chip: 'v5e', 'h100', ...; 'gpu' for any GPU.
    shape: Chips of a slice along each axis; None without slices.
    num_slices: TPU slices, joined by the data centre network.
    nodes_per_slice: Machines of a slice, or all of them without slices.
    devices_per_node: Chips or GPUs of one machine.
  """

  platform: Literal['tpu', 'gpu', 'cpu']
  chip: str
  shape: str | None
  num_slices: int
  nodes_per_slice: int
  devices_per_node: int

  @property
  def num_nodes(self) -> int:
    """Machines in all; each runs one process."""
    return self.num_slices * self.nodes_per_slice

  @property
  def chips_per_slice(self) -> int:
    return self.nodes_per_slice * self.devices_per_node


def parse(text: str) -> Machines:
  """Reads the machines' name.

  Raises:
    ValueError: If there are none of this name; says which there are.
  """
  found = re.fullmatch(
    r'([a-z0-9]+):(\d+(?:x\d+){0,2})(?:,slices=(\d+))?', text
  )
  chip = found[1] if found else ''
  if found is None or chip not in ('v5e', 'v6e', 'v5p', 'cpu', *_GPUS):
    raise ValueError(f'--accelerator={text} is not known; use {SYNTAX}.')
  if chip[0] == 'v':
    return _parse_tpu(text)
  sizes = [int(size) for size in found[2].split('x')]
  if found[3] or len(sizes) > 2 or not all(sizes):
    raise ValueError(
      f'--accelerator={text} must be a positive number in a node and a number '
      f'of nodes; for example {chip}:{1 if chip == "cpu" else 8}x2.'
    )
  if chip == 'cpu' and sizes[0] != 1:
    raise ValueError(
      f'--accelerator={text} must have one process in a node; write '
      f'cpu:1x{math.prod(sizes)}.'
    )
  platform = 'cpu' if chip == 'cpu' else 'gpu'
  return Machines(platform, chip, None, 1, math.prod(sizes[1:]), sizes[0])


def _parse_tpu(text: str) -> Machines:
  name = topology.parse(text)
  assert name.chip is not None
  shape = 'x'.join(str(size) for size in name.shape)
  if name.chip == 'v5p':
    fits = math.prod(name.shape) % _CHIPS_PER_HOST == 0 and all(
      size in (1, 2) or size % 4 == 0 for size in name.shape
    )
    known = '2x2x1, 2x2x2, 2x2x4, 2x4x4 or multiples of 4 along each axis'
  else:
    fits = shape in _FLAT_SHAPES
    known = ', '.join(_FLAT_SHAPES)
  if not fits:
    raise ValueError(
      f'--accelerator={text} cannot be ordered: {shape} must be one of {known}.'
    )
  chips = math.prod(name.shape)
  is_one_host = chips <= (4 if name.chip == 'v5p' else 8)
  per_node = chips if is_one_host else _CHIPS_PER_HOST
  return Machines(
    'tpu', name.chip, shape, name.num_slices, chips // per_node, per_node
  )
