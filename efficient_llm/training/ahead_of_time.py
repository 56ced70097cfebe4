"""Compiles a train step for devices that need not be there."""

import dataclasses
import math
import re
import time
from typing import Any, Protocol

import jax

from efficient_llm.training import hlo, topology

_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class Program(Protocol):
  """A step and shapes with shardings of what it takes."""

  @property
  def mesh(self) -> jax.sharding.Mesh: ...
  @property
  def train_step(self) -> Any: ...
  @property
  def abstract_state(self) -> Any: ...
  @property
  def abstract_batch(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device; None where the compiler gave up before saying.

  Attributes:
    arguments: State and batch.
    temporaries: Activations, gradients and all else that lives in a step.
    results: Results that do not take the place of an argument.
    code: The program itself.
  """

  arguments: int | None
  temporaries: int | None
  results: int | None
  code: int | None
  peak: int | None
  limit: int | None


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Outcome of a compilation; no program where it ran out of memory."""

  memory: Memory
  program: hlo.Program | None
  fits: bool | None
  secs: float


def compile_step(
  program: Program, where: topology.Topology, *, fast: bool
) -> Compiled:
  """Compiles the train step of a program as it would run.

  Args:
    program: Whose mesh is made of the devices of `where`.
    where: The devices.
    fast: Leave out optimisation.
  Raises:
    ValueError: If a library that the program needs is not installed, or the
      compiler does not tell what it needs.
  """
  level = jax.config.values['jax_optimization_level']
  start = time.perf_counter()
  try:
    if fast:
      jax.config.update('jax_optimization_level', 'O0')
    with jax.set_mesh(program.mesh):
      lowered = program.train_step.trace(
        program.abstract_state, program.abstract_batch
      ).lower(lowering_platforms=(where.platform,))
    compiled = lowered.compile()
  except RuntimeError as error:
    memory = _memory_of_failure(error, program, where)
    return Compiled(memory, None, False, time.perf_counter() - start)
  finally:
    jax.config.update('jax_optimization_level', level)
  secs = time.perf_counter() - start
  found, text = compiled.memory_analysis(), compiled.as_text()
  if found is None or text is None:
    raise ValueError(
      f'The compiler for {where.name} does not tell what a program needs; plan '
      'for another topology.'
    )
  parts = (
    found.argument_size_in_bytes,
    found.temp_size_in_bytes,
    # The new state takes the place of the old one.
    found.output_size_in_bytes - found.alias_size_in_bytes,
    found.generated_code_size_in_bytes,
  )
  limit = where.memory_limit_bytes
  # The TPU compiler refuses what does not fit, the others do not.
  fits = True if where.platform == 'tpu' else None
  if fits is None and limit is not None:
    fits = sum(parts) <= limit
  memory = Memory(*parts, peak=sum(parts), limit=limit)
  return Compiled(memory, hlo.parse(text), fits, secs)


def argument_bytes(program: Program) -> int:
  """Bytes of state and batch on one device, by arithmetic."""
  return device_bytes((program.abstract_state, program.abstract_batch))


def device_bytes(tree: Any) -> int:
  """Bytes of arrays on one device, by their shapes and shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _memory_of_failure(
  error: RuntimeError, program: Program, where: topology.Topology
) -> Memory:
  """Reads the TPU compiler's out-of-memory message.

  Raises:
    ValueError: If a library that the program needs is not installed.
    RuntimeError: The same error, if it is about something else.
  """
  message = ' '.join(str(error).split())
  if 'cuDNN' in message:
    raise ValueError(
      f'Planning cuDNN attention for {where.name} needs the cuDNN library; run '
      'pip install nvidia-cudnn-cu13, or set '
      '--config.model.attention_implementation=xla.'
    ) from error
  if 'RESOURCE_EXHAUSTED' not in message:
    raise error
  sizes = [
    round(float(number) * _UNITS[unit])
    for number, unit in re.findall(r'\b(\d+(?:\.\d+)?)([KMGT])\b', message)
  ]
  return Memory(
    arguments=argument_bytes(program),
    temporaries=None,
    results=None,
    code=None,
    peak=max(sizes, default=None),
    limit=where.memory_limit_bytes,
  )
