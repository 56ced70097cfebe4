"""What comes before the large model's training: learning, growing, the card."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding, typing
from efficient_llm.data import dataset as dataset_lib
from efficient_llm.data import images, pipeline
from efficient_llm.ligo import (
  card,
  inheritance,
  learning,
  methods,
  sub_models,
)
from efficient_llm.ligo import operator as operator_lib
from efficient_llm.ligo import state as growth_state
from efficient_llm.ligo.config import LigoConfig
from efficient_llm.models import transformer
from efficient_llm.training import (
  batch_layout,
  datasets,
  evaluation,
  objectives,
  pretrain,
  step,
  strict_json,
  trained_run,
)
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import state as state_lib


class Stage:
  """From the small model's checkpoint to the large model's first state."""

  def __init__(
    self,
    config: LigoConfig,
    small: trained_run.TrainedRun,
    begin: operator_lib.Operator,
    workdir: pathlib.Path,
  ):
    """Puts the programs together; compiles nothing yet.

    Args:
      config: The run.
      small: The small model's.
      begin: The operator before anything is learned.
      workdir: Folder of the run.
    """
    self._config, self._small = config, small
    self._begin, self._workdir = begin, workdir
    self._mesh = sharding.make_mesh(config.mesh)
    shapes = transformer.abstract_params(small.model)
    placed = sharding.param_shardings(
      self._mesh, transformer.logical_axes(small.model), shapes
    )
    self._abstract_small = state_lib.abstract(shapes, placed)
    self._program: learning.Program | None = None
    if config.learn.num_steps:
      self._program = learning.build(
        config.learn,
        small.model,
        config.model,
        begin,
        self._mesh,
        skip_nonfinite=config.loop.nonfinite == 'skip',
      )

  def learn(self) -> loop_lib.Outcome | None:
    """Learns the operator, where it is to be learned."""
    config, program = self._config, self._program
    if program is None:
      return None
    data = dataclasses.replace(
      config.data,
      # Other sequences than those the large model will begin with.
      seed=config.data.seed + 1,
      batch_size=config.learn.batch_size or config.data.batch_size,
    )
    dataset, _ = self._open(data)
    rows = sharding.batch_sharding(self._mesh)
    batch_layout.check_batch_size(data.batch_size, rows, num_microbatches=1)
    place = functools.partial(sharding.to_global, sharding=rows)
    share = batch_layout.process_share(rows, data.batch_size)
    params = self._small.restore_params(self._abstract_small)

    def learn_step(
      state: state_lib.TrainState, batch: typing.Batch
    ) -> tuple[state_lib.TrainState, typing.Metrics]:
      return program.learn_step(state, batch, params)

    with (
      jax.set_mesh(self._mesh),
      contextlib.closing(dataset.iterate(process=share)) as batches,
    ):
      return loop_lib.run(
        dataclasses.replace(
          config.loop,
          num_steps=config.learn.num_steps,
          eval_every=None,
          num_microbatches=1,
          profile_steps=None,
        ),
        loop_lib.Task(
          title='operator',
          step=learn_step,
          batches=batches,
          place=place,
          metadata={'small': self._small.describe()},
          unit=config.unit,
        ),
        make_state=program.first_state,
        abstract_state=program.abstract_state,
        workdir=self._workdir / 'operator',
      )

  def first_state(
    self, learned: loop_lib.Outcome | None, program: pretrain.Program
  ) -> state_lib.TrainState:
    """The large model's state of step 0; writes the growth card."""
    config, small = self._config, self._small
    operator = self._begin
    if learned is not None and self._program is not None:
      operator = self._program.operator(learned.state.params)
    optimizer = optimizer_lib.make_optimizer(
      config.optimizer,
      transformer.logical_axes(config.model),
      num_steps=config.loop.num_steps,
    )
    key = jax.random.split(jax.random.key(config.seed))[1]
    small_state = self._small_state()
    grow = jax.jit(
      functools.partial(
        growth_state.grow,
        small.model,
        optimizer=optimizer,
        key=key,
        moments=config.moments,
      ),
      out_shardings=jax.tree.map(lambda x: x.sharding, program.abstract_state),
    )
    state = grow(small_state, operator)
    grown = {'grown': state.params}
    if learned is not None:
      grown = {'begun': grow(small_state, self._begin).params, **grown}
    self._write_card(small_state.params, grown, learned, program)
    return state

  @property
  def step_maker(self) -> Callable[[pretrain.Program], step.TrainStep] | None:
    """Makes the train step where it is not plain training's."""
    config = self._config
    if config.sub_model_layers is not None:
      return functools.partial(sub_models.make_step, config)
    if config.inherit.weight:
      return self._taught_step
    return None

  def _taught_step(self, program: pretrain.Program) -> step.TrainStep:
    return inheritance.make_step(
      self._config,
      self._small.model,
      self._small.restore_params(self._abstract_small),
      program,
    )

  def _small_state(self) -> state_lib.TrainState:
    """The small model's state; its moments only where they are wanted."""
    if not self._config.moments:
      params = self._small.restore_params(self._abstract_small)
      zero = jnp.int32(0)
      return state_lib.TrainState(zero, params, (), zero)
    return growth_state.restore(self._small, self._mesh)

  def _write_card(
    self,
    small_params: typing.Params,
    grown: dict[str, typing.Params],
    learned: loop_lib.Outcome | None,
    program: pretrain.Program,
  ) -> None:
    """Losses around growth, on the validation split."""
    config, small = self._config, self._small
    method = methods.get(config.method)
    found: dict[str, Any] = {
      'method': config.method,
      'small': small.describe(),
      'loss_of_function': methods.loss_of_function(
        method, small.model, config.model
      ),
      'operator_steps': 0 if learned is None else int(learned.state.step),
      'operator_tokens': 0.0 if learned is None else learned.num_tokens,
      'operator_secs': 0.0 if learned is None else learned.train_secs,
      'teacher_flops': inheritance.flops(config, small.model),
    }
    _, validation = self._open(config.data)
    if validation is not None:
      small_eval = step.jit_eval_step(
        objectives.language_model_loss(small.model),
        jax.tree.map(lambda x: x.sharding, self._abstract_small),
        program.batch_sharding,
      )
      losses = {'small_loss': (small_params, small_eval)}
      for name, params in grown.items():
        losses[f'{name}_loss'] = (params, program.eval_step)
      for name, (params, eval_step) in losses.items():
        found[name] = evaluation.evaluate(
          validation,
          params,
          eval_step=eval_step,
          place=functools.partial(
            sharding.to_global, sharding=program.batch_sharding
          ),
          num_batches=config.loop.eval_batches,
          process=batch_layout.process_share(
            program.batch_sharding, config.data.batch_size
          ),
        )['loss']
      batch = validation.batch_at(0)
      found['function_error'] = self._function_error(
        small_params,
        grown['grown'],
        objectives.inputs_of(config.model, batch)[:1],
      )
    if jax.process_index() == 0:
      path = self._workdir / card.FILE_NAME
      strict_json.write_atomically(path, strict_json.to_json(found, indent=2))

  def _function_error(
    self, small_params: typing.Params, grown: typing.Params, inputs: Any
  ) -> float:
    """Largest difference of logits, as a share of the largest one."""
    config, small = self._config, self._small

    @jax.jit
    def error(small_params: Any, grown: Any, inputs: Any) -> jax.Array:
      theirs = transformer.apply(small.model, small_params, inputs).logits
      ours = transformer.apply(config.model, grown, inputs).logits
      assert ours is not None
      assert theirs is not None
      return abs(ours - theirs).max() / abs(theirs).max()

    return float(error(small_params, grown, inputs))

  def _open(
    self, data: pipeline.DataConfig
  ) -> tuple[dataset_lib.Dataset, dataset_lib.Dataset | None]:
    found = datasets.open_both(data, cache_dir=self._workdir / 'cache')
    vocabulary = found[0].vocabulary
    theirs = self._small.tokenizer
    if vocabulary.fingerprint == theirs['fingerprint']:
      return found
    if isinstance(vocabulary, images.Classes):
      raise ValueError(
        f'data.path={data.path!r} must have the classes of the small model, '
        f'{theirs.get("classes")}, and has {list(vocabulary.names)}; set it.'
      )
    raise ValueError(
      f'data.tokenizer={data.tokenizer!r} must be that of the small model, '
      f'{theirs["name"]!r}, and has other tokens; set it, or data.path to the '
      'text that it was made from.'
    )
