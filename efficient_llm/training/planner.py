"""What a run will need, from compiling its real train step ahead of time.

READ FIRST: `plan`. The devices may be absent: `topology` gives stand-ins that
the TPU and CUDA compilers take. Nothing is run and no data is opened.
"""

import collections as collections_lib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax

from efficient_llm import sharding
from efficient_llm.models import attention, transformer
from efficient_llm.training import (
  ahead_of_time,
  collectives,
  estimates,
  knobs,
  memory_traffic,
  pretrain,
  topology,
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the compiler says about a run.

  Attributes:
    params: Parameters by group.
    fits: Whether a step's memory fits; None where the limit is not known.
    peak_bytes_per_device: All the memory of a step: arguments, temporaries,
      results and code; None if the compiler did not say.
    checkpoint_bytes: The saved state, over all files.
    unit: What a token is called.
    flops_per_step: What the model needs; recomputation is not counted.
    collectives: Bytes between devices, by kind and mesh axes.
    memory_traffic_bytes_per_device: Read and written in a step.
    estimate: Seconds per step and what they imply; never measured.
    remedy: When it does not fit, what to change.
    assumptions: What the estimates take for granted, one sentence each.
  """

  topology: str
  device_kind: str
  num_devices: int
  mesh: dict[str, int]
  attention: str
  num_params: int
  params: dict[str, int]
  fits: bool | None
  peak_bytes_per_device: int | None
  memory: ahead_of_time.Memory
  checkpoint_bytes: int
  unit: str
  tokens_per_step: int
  num_steps: int
  flops_per_step: float
  collectives: tuple[collectives.Collective, ...]
  memory_traffic_bytes_per_device: int | None
  estimate: estimates.Estimate | None
  remedy: knobs.Remedy | None
  assumptions: tuple[str, ...]
  compile_secs: float


def as_dict(plan: Plan) -> dict[str, Any]:
  """A plan as plain data, with the sums that a reader wants at the top."""
  data = dataclasses.asdict(plan)
  secs = None if plan.estimate is None else plan.estimate.step_secs
  return {
    **data,
    'params_by_group': data['params'],
    'params': plan.num_params,
    'tokens_total': plan.tokens_per_step * plan.num_steps,
    'flops_total': plan.flops_per_step * plan.num_steps,
    'step_secs_estimate': secs,
  }


def plan(
  config: pretrain.PretrainConfig,
  where: topology.Topology,
  *,
  fast: bool = False,
  max_trials: int = 4,
  matmul_efficiency: float = estimates.MATMUL_EFFICIENCY,
) -> Plan:
  """Compiles the train step of a run for some devices and reads the result.

  Args:
    config: The run.
    where: The devices.
    fast: Compile without optimisation: several times faster, for checks of
      shardings; memory and collectives are then above those of a real run.
    max_trials: If it does not fit, how many changed configurations are
      compiled to find what helps.
    matmul_efficiency: Share of the peak rate that matrix products reach.
  Raises:
    ValueError: If the configuration and the devices do not go together.
  """
  config.validate()
  estimates.check_efficiency(matmul_efficiency)
  mesh = _make_mesh(config, where)
  program = pretrain.build(config, mesh)
  state_bytes = _global_bytes(program.abstract_state)
  compiled = ahead_of_time.compile_step(program, where, fast=fast)
  remedy = None
  if compiled.fits is False:
    remedy = knobs.find(
      config,
      mesh.shape,
      now=knobs.Trial(False, compiled.memory.peak),
      state_bytes=state_bytes,
      limit_bytes=where.memory_limit_bytes,
      compile_trial=functools.partial(_compile_trial, where=where, fast=fast),
      max_trials=max_trials,
    )
  tokens = config.tokens_per_step
  flops = tokens * config.flops_per_token
  measures = _measures(config, program, compiled, where, flops=flops)
  estimate, assumptions = None, ()
  if measures is not None:
    estimate, assumptions = estimates.estimate(
      measures,
      estimates.rates_of(where, dtype=config.model.dtype),
      matmul_efficiency=matmul_efficiency,
    )
  return Plan(
    topology=where.name,
    device_kind=where.devices[0].device_kind,
    num_devices=mesh.size,
    mesh=dict(mesh.shape),
    attention=attention.choose(
      config.model.attention_implementation, where.devices[0].platform
    ),
    num_params=transformer.num_params(config.model),
    params=_params_by_group(program.abstract_state.params),
    fits=compiled.fits,
    peak_bytes_per_device=compiled.memory.peak,
    memory=compiled.memory,
    checkpoint_bytes=state_bytes,
    unit=config.unit,
    tokens_per_step=tokens,
    num_steps=config.loop.num_steps,
    flops_per_step=flops,
    collectives=() if measures is None else measures.collectives,
    memory_traffic_bytes_per_device=(
      None if measures is None else measures.memory_traffic_bytes
    ),
    estimate=estimate,
    remedy=remedy,
    assumptions=(*_caveats(compiled, where.platform, fast=fast), *assumptions),
    compile_secs=compiled.secs,
  )


def _make_mesh(
  config: pretrain.PretrainConfig, where: topology.Topology
) -> jax.sharding.Mesh:
  try:
    return sharding.make_mesh(config.mesh, devices=where.devices)
  except NotImplementedError as error:
    # How jax says that an axis would have to bend around the torus.
    raise ValueError(
      f'The mesh {dataclasses.asdict(config.mesh)} must be made of whole axes '
      f'of {where.name}; set each of mesh.data, mesh.fsdp and mesh.tensor to a '
      'product of its sizes.'
    ) from error


def _compile_trial(
  config: pretrain.PretrainConfig, *, where: topology.Topology, fast: bool
) -> knobs.Trial | None:
  """Compiles a changed configuration; None where it is not a legal one."""
  try:
    config.validate()
    program = pretrain.build(config, _make_mesh(config, where))
  except ValueError:
    return None
  compiled = ahead_of_time.compile_step(program, where, fast=fast)
  return knobs.Trial(compiled.fits, compiled.memory.peak)


def _measures(
  config: pretrain.PretrainConfig,
  program: pretrain.Program,
  compiled: ahead_of_time.Compiled,
  where: topology.Topology,
  *,
  flops: float,
) -> estimates.Work | None:
  """What the program does in a step; None if there is no program."""
  if compiled.program is None:
    return None
  devices = program.mesh.devices.flat
  granule_of = dict(
    zip((d.id for d in where.devices), where.granules, strict=True)
  )
  layout = collectives.Layout(
    dict(program.mesh.shape), [granule_of[device.id] for device in devices]
  )
  return estimates.Work(
    model_flops=flops,
    recomputed_share=estimates.recomputed_share(config.model),
    memory_traffic_bytes=memory_traffic.count(compiled.program),
    collectives=tuple(collectives.collect(compiled.program, layout)),
    num_devices=program.mesh.size,
    num_steps=config.loop.num_steps,
    tokens_per_step=config.tokens_per_step,
  )


def _caveats(
  compiled: ahead_of_time.Compiled, platform: str, *, fast: bool
) -> Iterator[str]:
  yield 'Compiled, not run: times are estimates and nothing was measured.'
  if fast:
    yield 'Compiled without optimisation: memory and bytes are too high.'
  unknown = compiled.program.num_unknown_loops if compiled.program else 0
  if unknown:
    yield f'{unknown} loops of unknown length are counted as one round each.'
  limit, peak = compiled.memory.limit, compiled.memory.peak
  if platform == 'cuda' and peak and limit and 0.75 * limit < peak <= limit:
    yield (
      'Over 75 % of the memory, which is all that jax takes by default: set '
      'XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.'
    )


def _params_by_group(params: Any) -> dict[str, int]:
  """Parameters of each module, the parts of a layer one by one."""
  counts: dict[str, int] = collections_lib.defaultdict(int)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
    counts['/'.join(names[: 2 if names[0] == 'layers' else 1])] += leaf.size
  return dict(counts)


def _global_bytes(tree: Any) -> int:
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
