"""What the chips can do: published peaks, and a measured one for the CPU."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one accelerator chip, in base units, dense.

  Attributes:
    name: Short name, as used in a topology such as 'v5e:16x16'.
    matmul_flops_per_sec: Peak of a dense bfloat16 matrix product.
    float32_flops_per_sec: Peak in float32, None where none is published.
    hbm_bytes: Memory on the chip's package.
    hbm_bytes_per_sec: Peak bandwidth of that memory.
    interconnect_bytes_per_sec: To the other chips of the same slice or host,
      all links together, one direction; vendors print twice this.
    network_bytes_per_sec: This chip's share of the data centre network,
      one direction.
    source: Where the figures were published, and what was assumed.
  """

  name: str
  matmul_flops_per_sec: float
  float32_flops_per_sec: float | None
  hbm_bytes: int
  hbm_bytes_per_sec: float
  interconnect_bytes_per_sec: float
  network_bytes_per_sec: float
  source: str


@dataclasses.dataclass(frozen=True)
class Peak:
  """The rate that 100 % utilisation stands for."""

  flops_per_sec: float
  origin: Literal['published', 'measured']


CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name='v5e',
      matmul_flops_per_sec=197e12,
      float32_flops_per_sec=None,
      hbm_bytes=16 * 2**30,
      hbm_bytes_per_sec=819e9,
      interconnect_bytes_per_sec=200e9,
      network_bytes_per_sec=3.125e9,
      source='Cloud TPU v5e documentation; network: 6.4 Tbit/s per 256 chips.',
    ),
    Chip(
      name='v5p',
      matmul_flops_per_sec=459e12,
      float32_flops_per_sec=None,
      hbm_bytes=95 * 2**30,
      hbm_bytes_per_sec=2765e9,
      interconnect_bytes_per_sec=600e9,
      network_bytes_per_sec=6.25e9,
      source='Cloud TPU v5p documentation; network: 50 Gbit/s per chip.',
    ),
    Chip(
      name='v6e',
      matmul_flops_per_sec=918e12,
      float32_flops_per_sec=None,
      hbm_bytes=32 * 2**30,
      hbm_bytes_per_sec=1600e9,
      interconnect_bytes_per_sec=400e9,
      network_bytes_per_sec=12.5e9,
      source='Cloud TPU v6e documentation; network: 25.6 Tbit/s per 256 chips.',
    ),
    Chip(
      name='h100',
      matmul_flops_per_sec=989.4e12,
      float32_flops_per_sec=67e12,
      hbm_bytes=80 * 10**9,
      hbm_bytes_per_sec=3.35e12,
      interconnect_bytes_per_sec=450e9,
      network_bytes_per_sec=50e9,
      source='NVIDIA H100 SXM data sheet; network: 400 Gbit/s per GPU.',
    ),
    Chip(
      name='h200',
      matmul_flops_per_sec=989.4e12,
      float32_flops_per_sec=67e12,
      hbm_bytes=141 * 10**9,
      hbm_bytes_per_sec=4.8e12,
      interconnect_bytes_per_sec=450e9,
      network_bytes_per_sec=50e9,
      source='NVIDIA H200 SXM data sheet; network: 400 Gbit/s per GPU.',
    ),
    Chip(
      name='a100-40gb',
      matmul_flops_per_sec=312e12,
      float32_flops_per_sec=19.5e12,
      hbm_bytes=40 * 10**9,
      hbm_bytes_per_sec=1555e9,
      interconnect_bytes_per_sec=300e9,
      network_bytes_per_sec=25e9,
      source='NVIDIA A100 SXM data sheet; network: 200 Gbit/s per GPU.',
    ),
    Chip(
      name='a100-80gb',
      matmul_flops_per_sec=312e12,
      float32_flops_per_sec=19.5e12,
      hbm_bytes=80 * 10**9,
      hbm_bytes_per_sec=2039e9,
      interconnect_bytes_per_sec=300e9,
      network_bytes_per_sec=25e9,
      source='NVIDIA A100 SXM data sheet; network: 200 Gbit/s per GPU.',
    ),
    Chip(
      name='l4',
      matmul_flops_per_sec=121e12,
      float32_flops_per_sec=30.3e12,
      hbm_bytes=24 * 10**9,
      hbm_bytes_per_sec=300e9,
      interconnect_bytes_per_sec=32e9,
      network_bytes_per_sec=3.125e9,
      source='NVIDIA L4 data sheet (PCIe 4 x16); network: 25 Gbit/s assumed.',
    ),
    Chip(
      name='t4',
      matmul_flops_per_sec=65e12,
      float32_flops_per_sec=8.1e12,
      hbm_bytes=16 * 10**9,
      hbm_bytes_per_sec=320e9,
      interconnect_bytes_per_sec=16e9,
      network_bytes_per_sec=3.125e9,
      source='NVIDIA T4 data sheet (PCIe 3 x16); the peak is float16, the chip '
      'has no bfloat16; network: 25 Gbit/s assumed.',
    ),
  )
}

# Exact strings only: a PCIe or NVL board of the same family has another peak.
_CHIP_BY_DEVICE_KIND = {
  'TPU v5 lite': 'v5e',
  'TPU v5e': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
  'NVIDIA H100 80GB HBM3': 'h100',
  'NVIDIA H200': 'h200',
  'NVIDIA A100-SXM4-40GB': 'a100-40gb',
  'NVIDIA A100-SXM4-80GB': 'a100-80gb',
  'NVIDIA L4': 'l4',
  'Tesla T4': 't4',
}


def chip_for(device_kind: str) -> Chip | None:
  """Looks up the chip that jax reports under this `device_kind`."""
  name = _CHIP_BY_DEVICE_KIND.get(device_kind)
  return None if name is None else CHIPS[name]


@functools.cache
def measured_peak_flops() -> float:
  """Measures the float32 matrix product rate of this machine's CPU, FLOP/s.

  All its cores together, the best of a few runs of 2 x 1024^3 FLOPs; about
  0.1 s, once per process. A figure for utilisation on a laptop, not a
  benchmark.
  """
  size = 1024
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    operand = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot).lower(operand, operand).compile()
    product(operand, operand).block_until_ready()
    secs = []
    for _ in range(8):
      start = time.perf_counter()
      product(operand, operand).block_until_ready()
      secs.append(time.perf_counter() - start)
  return 2 * size**3 / min(secs)


def peak_flops(devices: Sequence[Any]) -> Peak | None:
  """Adds up the peaks of `devices`; None if one of them is not known.

  Takes jax devices. Accelerators count their published bfloat16 peak,
  whatever the run's dtype. CPU devices of one process share its cores and
  count once.
  """
  if not devices:
    raise ValueError('devices must not be empty; pass jax.devices().')
  if all(device.platform == 'cpu' for device in devices):
    num_processes = len({device.process_index for device in devices})
    return Peak(num_processes * measured_peak_flops(), 'measured')
  total = 0.0
  for device in devices:
    chip = chip_for(device.device_kind)
    if chip is None:
      return None
    total += chip.matmul_flops_per_sec
  return Peak(total, 'published')


def mfu(flops_per_sec: float, devices: Sequence[Any]) -> float | None:
  """Model FLOPs utilisation: the useful rate over the peak of `devices`.

  Args:
    flops_per_sec: FLOPs that the model needs, not those recomputed, per second
      over all devices.
    devices: The jax devices that shared the work.

  Returns:
    A fraction, usually below 1, or None if a device's peak is not known.

  Raises:
    ValueError: If there are no devices.
  Source: Chowdhery et al. 2022, appendix B, arXiv:2204.02311.
  """
  peak = peak_flops(devices)
  return None if peak is None else flops_per_sec / peak.flops_per_sec
