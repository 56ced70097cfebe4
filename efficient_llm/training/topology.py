"""Devices by name, whether they are here or not: 'v5e:16x16', 'h200:8'."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any, Literal

import jax
from jax.experimental import topologies

from efficient_llm.training import hardware

SYNTAX = (
  "v5e:16x16, v6e:16x16, v5p:4x4x4 (chips along each axis), with ',slices=2' "
  "for several slices; h100:8, h200:8 (GPUs; hosts of 8); or 'local'"
)

_TPU_DIMENSIONS = {'v5e': 2, 'v6e': 2, 'v5p': 3}
_GPUS = ('h100', 'h200')
_GPUS_PER_HOST = 8
# What libtpu leaves to a program, from its own out-of-memory message.
_TPU_LIMIT_GIB = {'v5e': 15.75, 'v6e': 31.25, 'v5p': 95.74}
# What may be had of a GPU's memory; jax takes 75 % unless told otherwise.
_GPU_LIMIT = 0.95


@dataclasses.dataclass(frozen=True)
class Name:
  """A topology's name, read.

  Attributes:
    chip: 'v5e', 'h200', ...; None for the local devices.
    shape: Chips along each axis of a slice, or the number of GPUs.
    num_slices: TPU slices, joined by the data centre network.
  """

  text: str
  kind: Literal['tpu', 'gpu', 'local']
  chip: str | None = None
  shape: tuple[int, ...] = ()
  num_slices: int = 1


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to compile for.

  Attributes:
    platform: What programs are lowered for: 'tpu', 'cuda' or 'cpu'.
    devices: Real ones, or stand-ins that only a compiler takes.
    chip: Published figures, where known.
    memory_limit_bytes: What one device has for a program, where known.
    granules: Slice or host of each device, in the order of `devices`.
  """

  name: str
  platform: str
  devices: tuple[Any, ...]
  chip: hardware.Chip | None
  memory_limit_bytes: int | None
  granules: tuple[int, ...]


def parse(text: str) -> Name:
  """Reads a topology's name, without any compiler.

  Raises:
    ValueError: If there is none of this name; lists those there are.
  """
  if text == 'local':
    return Name(text, 'local')
  found = re.fullmatch(r'([a-z0-9]+):(\d+(?:x\d+)*)(?:,slices=(\d+))?', text)
  if found is None or found[1] not in (*_TPU_DIMENSIONS, *_GPUS):
    raise ValueError(f'{text!r} is not a known topology; use {SYNTAX}.')
  chip, shape = found[1], tuple(int(n) for n in found[2].split('x'))
  num_slices = int(found[3] or 1)
  dimensions = _TPU_DIMENSIONS.get(chip, 1)
  if len(shape) != dimensions or not all(shape) or num_slices < 1:
    raise ValueError(
      f'{text!r} must name {dimensions} positive size(s) for {chip}; for '
      f'example {chip}:{"x".join("4" * dimensions)}.'
    )
  if chip in _GPUS:
    if num_slices > 1:
      raise ValueError(f'{text!r}: only TPUs have slices; leave them out.')
    if shape[0] > _GPUS_PER_HOST and shape[0] % _GPUS_PER_HOST:
      raise ValueError(
        f'{text!r} must be up to {_GPUS_PER_HOST} GPUs or whole hosts of '
        f'{_GPUS_PER_HOST}; use {chip}:{-(-shape[0] // 8) * 8}.'
      )
  kind = 'gpu' if chip in _GPUS else 'tpu'
  return Name(text, kind, chip, shape, num_slices)


def load(name: Name) -> Topology:
  """Makes the devices of a topology.

  Raises:
    ValueError: If the compiler for them is not installed, or refuses them.
  """
  if name.kind == 'local':
    return _local()
  chip = hardware.CHIPS[name.chip or '']
  if name.kind == 'tpu':
    devices = _tpu_devices(name)
    granules = tuple(getattr(d, 'slice_index', 0) for d in devices)
    limit = int(_TPU_LIMIT_GIB[chip.name] * 2**30)
    return Topology(name.text, 'tpu', devices, chip, limit, granules)
  devices = _gpu_devices(name, chip)
  granules = tuple(i // _GPUS_PER_HOST for i in range(len(devices)))
  limit = int(chip.hbm_bytes * _GPU_LIMIT)
  return Topology(name.text, 'cuda', devices, chip, limit, granules)


def _local() -> Topology:
  devices = jax.devices()
  platform = devices[0].platform
  statistics = None
  # Some backends refuse instead of answering that they keep none.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    statistics = devices[0].memory_stats()
  limit = (statistics or {}).get('bytes_limit')
  if limit is None and platform == 'cpu':
    pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    limit = pages // len(jax.local_devices())
  return Topology(
    name='local',
    platform='cuda' if platform == 'gpu' else platform,
    devices=tuple(devices),
    chip=hardware.chip_for(devices[0].device_kind),
    memory_limit_bytes=limit,
    granules=tuple(
      getattr(device, 'slice_index', device.process_index) for device in devices
    ),
  )


def _tpu_devices(name: Name) -> tuple[Any, ...]:
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      f'Planning for {name.text} needs the TPU compiler, which runs without a '
      f'TPU; run pip install "jax[tpu]=={jax.__version__}".'
    )
  options: dict[str, Any] = {}
  if name.num_slices > 1:
    options['num_slices'] = name.num_slices
  if math.prod(name.shape) == 1:
    options['chips_per_host_bounds'] = [1, 1, 1]
  sizes = 'x'.join(str(size) for size in name.shape)
  try:
    return tuple(
      topologies.get_topology_desc(
        platform='tpu', topology_name=f'{name.chip}:{sizes}', **options
      ).devices
    )
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f'The TPU compiler refuses {name.text!r}: {_first_line(error)}; use a '
      'size that exists, such as 2x2, 4x4 or 16x16 (v5p: 4x4x4).'
    ) from error


def _gpu_devices(name: Name, chip: hardware.Chip) -> tuple[Any, ...]:
  if not any(
    importlib.util.find_spec(f'jax_cuda{major}_plugin') for major in (13, 12)
  ):
    raise ValueError(
      f'Planning for {name.text} needs the CUDA compiler, which runs without a '
      f'GPU; run pip install jax-cuda13-plugin=={jax.__version__} '
      f'jax-cuda13-pjrt=={jax.__version__}.'
    )
  (count,) = name.shape
  hosts = max(1, count // _GPUS_PER_HOST)
  try:
    return tuple(
      topologies.get_topology_desc(
        platform='cuda',
        topology_name='',
        target_config=_hopper(chip),
        topology=f'1x{hosts}x{count // hosts}',
      ).devices
    )
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f'The CUDA compiler refuses {name.text!r}: {_first_line(error)}; check '
      'that the plug-in and jax have the same version.'
    ) from error


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0].rstrip('.')


def _hopper(chip: hardware.Chip) -> str:
  """XLA's description of a Hopper GPU, as a GpuTargetConfig text proto.

  Limits per block and core are those of compute capability 9.0 (CUDA C++
  Programming Guide, table of technical specifications).
  """
  numbers = {
    'threads_per_block_limit': 1024,
    'threads_per_warp': 32,
    'shared_memory_per_block': 48 * 1024,
    'shared_memory_per_block_optin': 227 * 1024,
    'shared_memory_per_core': 228 * 1024,
    'threads_per_core_limit': 2048,
    'core_count': 132,
    'fpus_per_core': 128,
    'block_dim_limit_x': 2**31 - 1,
    'block_dim_limit_y': 2**16 - 1,
    'block_dim_limit_z': 2**16 - 1,
    'registers_per_core_limit': 2**16,
    'registers_per_block_limit': 2**16,
    'l2_cache_size': 50 * 2**20,
    'clock_rate_ghz': 1.98,
    'memory_bandwidth': int(chip.hbm_bytes_per_sec),
    'device_memory_size': chip.hbm_bytes,
  }
  device = ' '.join(f'{key}: {value}' for key, value in numbers.items())
  capability = 'major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES'
  return (
    f'gpu_device_info {{ {device} '
    f'cuda_compute_capability {{ {capability} }} }} '
    'platform_name: "CUDA" '
    'dnn_version_info { major: 9 minor: 14 } '
    'runtime_version { major: 13 minor: 0 patch: 0 } '
    f'device_description_str: "NVIDIA {chip.name.upper()}"'
  )
