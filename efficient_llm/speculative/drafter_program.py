"""The step of a drafter's training: configuration, program."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding, typing
from efficient_llm.data import pipeline
from efficient_llm.models import attention, transformer
from efficient_llm.speculative import (
  drafter,
  drafter_form,
  drafter_loss,
  target_run,
)
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import objectives, step
from efficient_llm.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
  """All there is to the training of a drafter.

  Attributes:
    target: Folder of the pre-training run whose model it drafts for.
    path: Other text than the target's.
    batch_size: Sequences in a batch; as the target's where None.
    sequence_length: Tokens in a sequence; as the target's where None.
    start: The target's last layer, or random parameters.
    form: Which norms the drafter has: 'eagle' has those of EAGLE's own, which
      other engines load (see `experiments.convert`).
    seed: Of parameters and noise; the target's data.seed orders the data.
  """

  target: str | None = None
  path: str | None = None
  batch_size: int | None = None
  sequence_length: int | None = None
  start: Literal['last_layer', 'random'] = 'last_layer'
  form: drafter_form.Form = 'normed'
  loss: drafter_loss.DrafterLossConfig = drafter_loss.DrafterLossConfig()
  optimizer: optimizer_lib.OptimizerConfig = optimizer_lib.OptimizerConfig()
  loop: loop_lib.LoopConfig = loop_lib.LoopConfig()
  mesh: sharding.MeshConfig = sharding.MeshConfig()
  seed: int = 0

  def validate(self) -> None:
    """Checks every part; `data` checks what concerns the target."""
    typing.check_choices(self, name='config')
    for part in (self.loss, self.optimizer, self.loop, self.mesh):
      part.validate()
    optimizer_lib.make_schedule(self.optimizer, num_steps=self.loop.num_steps)

  def data(self, target: target_run.TargetRun) -> pipeline.DataConfig:
    """The target's data set with this run's changes."""
    changes: dict[str, Any] = {
      name: getattr(self, name)
      for name in ('path', 'batch_size', 'sequence_length')
      if getattr(self, name) is not None
    }
    if self.path is not None:
      changes |= {'sources': (), 'weights': (), 'validation_path': None}
    data = dataclasses.replace(target.data, **changes)
    data.validate()
    if data.sequence_length > target.model.max_positions:
      raise ValueError(
        f'sequence_length={data.sequence_length} must not exceed the '
        f"{target.model.max_positions} positions of the target's model; lower "
        'it.'
      )
    return data


# (state, batch, target_params) -> (state, metrics), donating the state.
DrafterStep = Callable[
  [state_lib.TrainState, typing.Batch, typing.Params],
  tuple[state_lib.TrainState, typing.Metrics],
]


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled-on-first-use functions of a run and what they work on.

  The target's parameters are an argument of each, so that newer ones can be
  given at any step and none are compiled in.

  Attributes:
    train_step: (state, batch, target_params) -> (state, metrics), donating the
      state.
    eval_step: (params, batch, target_params) -> Loss, without noise.
    init_state: target_params -> the state of step 0, already sharded.
    abstract_state: Shapes, dtypes and shardings of the state.
    abstract_target: The same of the target's parameters.
    batch_sharding: Where a batch's rows lie.
  """

  train_step: DrafterStep
  eval_step: Callable[..., objectives.Loss]
  init_state: Callable[[typing.Params], state_lib.TrainState]
  abstract_state: state_lib.TrainState
  abstract_target: typing.PyTree
  batch_sharding: NamedSharding


def build(
  config: DrafterConfig, model: transformer.TransformerConfig, mesh: Mesh
) -> Program:
  """Puts drafter, target, optimiser and shardings together.

  Args:
    config: The run; its target is not read.
    model: The target model.
    mesh: The devices.
  Raises:
    ValueError: If the model cannot have a drafter or does not fit the mesh.
  """
  platform = mesh.devices.flat[0].platform
  model = dataclasses.replace(
    model,
    attention_implementation=attention.choose(
      model.attention_implementation, platform
    ),
  )
  axes = drafter.logical_axes(model, form=config.form)
  optimizer = optimizer_lib.make_optimizer(
    config.optimizer, axes, num_steps=config.loop.num_steps
  )

  def init_state(target_params: typing.Params) -> state_lib.TrainState:
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    start = target_params if config.start == 'last_layer' else None
    params = drafter.init(model, init_key, start, form=config.form)
    return state_lib.create(params, optimizer, train_key)

  target_shapes = transformer.abstract_params(model)
  target = sharding.param_shardings(
    mesh, transformer.logical_axes(model), target_shapes
  )
  shapes = jax.eval_shape(init_state, target_shapes)
  state = state_lib.shardings(shapes, axes, mesh)
  batch_sharding = sharding.batch_sharding(mesh)
  loss = drafter_loss.loss_fn(model, config.loss)
  eval_loss = drafter_loss.loss_fn(
    model, dataclasses.replace(config.loss, noise=0.0)
  )

  def train_step(
    state: state_lib.TrainState,
    batch: typing.Batch,
    target_params: typing.Params,
  ) -> tuple[state_lib.TrainState, typing.Metrics]:
    one = step.make_train_step(
      lambda params, batch, key: loss(params, target_params, batch, key),
      optimizer,
      num_microbatches=config.loop.num_microbatches,
      skip_nonfinite=config.loop.nonfinite == 'skip',
    )
    return one(state, batch)

  def eval_step(
    params: typing.Params, batch: typing.Batch, target_params: typing.Params
  ) -> objectives.Loss:
    return eval_loss(params, target_params, batch, jax.random.key(0))

  return Program(
    train_step=jax.jit(
      train_step,
      in_shardings=(state, batch_sharding, target),
      out_shardings=(state, None),
      donate_argnums=0,
    ),
    eval_step=jax.jit(
      eval_step, in_shardings=(state.params, batch_sharding, target)
    ),
    init_state=jax.jit(init_state, in_shardings=(target,), out_shardings=state),
    abstract_state=state_lib.abstract(shapes, state),
    abstract_target=jax.tree.map(
      lambda leaf, where: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=where
      ),
      target_shapes,
      target,
    ),
    batch_sharding=batch_sharding,
  )
