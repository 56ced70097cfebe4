"""The compiled functions of a run, out of a model, a loss and an optimiser."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh

from efficient_llm import sharding, typing
from efficient_llm.training import batch_layout, objectives, step
from efficient_llm.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled-on-first-use functions of a run and what they work on.

  Attributes:
    mesh: The device mesh; calls happen inside `jax.set_mesh(mesh)`.
    train_step: (state, batch) -> (state, metrics), donating the state.
    eval_step: (params, batch) -> Loss.
    init_state: Makes the state of step 0, already sharded.
    abstract_state: Shapes, dtypes and shardings of the state.
    abstract_batch: The same for a batch.
    batch_sharding: Where a batch's rows lie.
  """

  mesh: Mesh
  train_step: step.TrainStep
  eval_step: step.EvalStep
  init_state: Callable[[], state_lib.TrainState]
  abstract_state: state_lib.TrainState
  abstract_batch: Mapping[str, jax.ShapeDtypeStruct]
  batch_sharding: jax.sharding.NamedSharding


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a program is made of, before it is laid out on a mesh.

  Attributes:
    axes: Tree of LogicalAxes, one per parameter.
    init_state: Makes the state of step 0 from a key.
    train_step: (state, batch) -> (state, metrics).
    eval_loss: Gives the plain loss for params, batch and key.
  """

  axes: typing.PyTree
  init_state: Callable[[jax.Array], state_lib.TrainState]
  train_step: step.TrainStep
  eval_loss: objectives.LossFn


def lay_out(
  parts: Parts,
  mesh: Mesh,
  abstract_batch: Mapping[str, jax.ShapeDtypeStruct],
  *,
  num_microbatches: int,
  seed: int,
) -> Program:
  """Puts the parts of a program on devices; compiles nothing yet.

  Args:
    parts: What it is made of.
    mesh: The devices.
    abstract_batch: Shape, dtype and sharding of everything in a batch.
    num_microbatches: Parts a batch is worked off in.
    seed: Of the state of step 0.
  Raises:
    ValueError: If the model or the batch does not fit the mesh.
  """
  shapes = jax.eval_shape(parts.init_state, jax.random.key(0))
  shardings = state_lib.shardings(shapes, parts.axes, mesh)
  batch_sharding = sharding.batch_sharding(mesh)
  batch_layout.check_batch_size(
    abstract_batch['targets'].shape[0],
    batch_sharding,
    num_microbatches=num_microbatches,
  )
  return Program(
    mesh=mesh,
    train_step=step.jit_train_step(parts.train_step, shardings, batch_sharding),
    eval_step=step.jit_eval_step(
      parts.eval_loss, shardings.params, batch_sharding
    ),
    init_state=functools.partial(
      jax.jit(parts.init_state, out_shardings=shardings),
      jax.random.key(seed),
    ),
    abstract_state=state_lib.abstract(shapes, shardings),
    abstract_batch=abstract_batch,
    batch_sharding=batch_sharding,
  )
