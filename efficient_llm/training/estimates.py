"""Seconds per step from published peak rates: an estimate, not a measurement.

step = max(compute, memory) + what of the collectives nothing hides
"""

import dataclasses

from efficient_llm.models import transformer
from efficient_llm.training import collectives as collectives_lib
from efficient_llm.training import hardware, topology

# Large bfloat16 products reach about this share of the peak on TPU and Hopper.
MATMUL_EFFICIENCY = 0.7


@dataclasses.dataclass(frozen=True)
class Rates:
  """Peak rates of one device; None where none is published.

  Attributes:
    flops_per_sec: Of matrix products in the run's type.
    peak_flops_per_sec: What 100 % utilisation stands for (bfloat16).
    origin: Where the figures are from.
  """

  flops_per_sec: float
  peak_flops_per_sec: float
  memory_bytes_per_sec: float | None
  interconnect_bytes_per_sec: float | None
  network_bytes_per_sec: float | None
  origin: str


@dataclasses.dataclass(frozen=True)
class Work:
  """What a step does.

  Attributes:
    model_flops: Over all devices, without recomputation.
    recomputed_share: FLOPs of recomputation as a share of those.
    memory_traffic_bytes: Of each device.
    collectives: Of each device.
  """

  model_flops: float
  recomputed_share: float
  memory_traffic_bytes: int
  collectives: tuple[collectives_lib.Collective, ...]
  num_devices: int
  num_steps: int
  tokens_per_step: int


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a step, and what they imply.

  Attributes:
    compute_secs: Matrix products at the assumed efficiency.
    memory_secs: Main memory at its peak rate; None where that is not known.
    collective_secs: All collectives one after the other.
    exposed_collective_secs: Those that no other work hides.
    mfu: Model FLOPs utilisation of the published peak.
    total_secs: All steps; compilation, evaluation and saving not counted.
  """

  compute_secs: float
  memory_secs: float | None
  collective_secs: float
  exposed_collective_secs: float
  step_secs: float
  tokens_per_sec: float
  mfu: float
  total_secs: float


def check_efficiency(matmul_efficiency: float) -> None:
  """Refuses what is no share."""
  if not 0 < matmul_efficiency <= 1:
    raise ValueError(
      f'{matmul_efficiency=} must be in (0, 1]; it is the share of the peak '
      'rate that matrix products reach.'
    )


def recomputed_share(model: transformer.TransformerConfig) -> float:
  """Full rematerialisation runs the forward third of a step twice."""
  return 1 / 3 if model.remat == 'full' else 0.0


def rates_of(where: topology.Topology, *, dtype: str) -> Rates | None:
  """Rates of one of these devices; None for a device nobody described."""
  chip = where.chip
  if chip is not None:
    flops = chip.matmul_flops_per_sec
    if dtype == 'float32' and chip.float32_flops_per_sec is not None:
      flops = chip.float32_flops_per_sec
    return Rates(
      flops_per_sec=flops,
      peak_flops_per_sec=chip.matmul_flops_per_sec,
      memory_bytes_per_sec=chip.hbm_bytes_per_sec,
      interconnect_bytes_per_sec=chip.interconnect_bytes_per_sec,
      network_bytes_per_sec=chip.network_bytes_per_sec,
      origin=f'Peak rates are published ones: {chip.source}',
    )
  if where.platform != 'cpu':
    return None
  # The simulated devices of a process share its cores.
  flops = hardware.measured_peak_flops() / len(where.devices)
  return Rates(
    flops_per_sec=flops,
    peak_flops_per_sec=flops,
    memory_bytes_per_sec=None,
    interconnect_bytes_per_sec=None,
    network_bytes_per_sec=None,
    origin='The peak rate is that of a matrix product on this CPU, measured; '
    'time for memory and between devices is left out.',
  )


def estimate(
  work: Work,
  rates: Rates | None,
  *,
  matmul_efficiency: float,
) -> tuple[Estimate | None, tuple[str, ...]]:
  """Estimates a step's time and says what it takes for granted."""
  if rates is None:
    return None, ('No peak rates are known for this device: no time is given.',)
  executed = work.model_flops * (1 + work.recomputed_share)
  compute = executed / (
    work.num_devices * rates.flops_per_sec * matmul_efficiency
  )
  memory = None
  if rates.memory_bytes_per_sec is not None:
    memory = work.memory_traffic_bytes / rates.memory_bytes_per_sec
  busy = max(compute, memory or 0.0)
  secs = {True: 0.0, False: 0.0}
  for moved in work.collectives:
    rate = (
      rates.network_bytes_per_sec
      if moved.crosses_network
      else rates.interconnect_bytes_per_sec
    )
    if rate is not None:
      secs[moved.overlapped] += moved.bytes_per_device_per_step / rate
  exposed = secs[False] + max(0.0, secs[True] - busy)
  step = busy + exposed
  result = Estimate(
    compute_secs=compute,
    memory_secs=memory,
    collective_secs=sum(secs.values()),
    exposed_collective_secs=exposed,
    step_secs=step,
    tokens_per_sec=work.tokens_per_step / step,
    mfu=work.model_flops / (work.num_devices * rates.peak_flops_per_sec * step),
    total_secs=step * work.num_steps,
  )
  return result, (
    f'Matrix products reach {matmul_efficiency:.0%} of the peak rate; '
    f'recomputation adds {work.recomputed_share:.0%} to the model FLOPs.',
    rates.origin,
    'Collectives go round rings that use all links of a device; those the '
    'compiler runs beside other work are hidden as long as that lasts.',
  )
