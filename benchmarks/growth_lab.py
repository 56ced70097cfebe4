"""Runs of growth on one device, compiled once for each shape.

The engine's own parts (operators, learning, train step, optimiser) without its
runs' folders, checkpoints and reports, which cost more than runs of a minute.

Over 300 lines: one class, whose programs all its runs share.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding, typing
from efficient_llm.data import dataset as dataset_lib
from efficient_llm.data import pipeline
from efficient_llm.ligo import config as ligo_config
from efficient_llm.ligo import inheritance, learning, methods, sub_models
from efficient_llm.ligo import operator as operator_lib
from efficient_llm.ligo import state as growth_state
from efficient_llm.models import transformer
from efficient_llm.models.config import TransformerConfig
from efficient_llm.training import datasets, objectives, pretrain
from efficient_llm.training import state as state_lib
from efficient_llm.training import step as step_lib

BATCH_SIZE, SEQUENCE_LENGTH = 16, 128
# Steps of one call of a program, after which a trial may be judged.
CHUNK = 10
_EVAL_EVERY = 20
# Of an average of the parameters, which is what is evaluated: a constant rate
# needs no decay to be compared at any step.
_EMA = 0.98
_EVAL_BATCHES = 4


class Texts:
  """The Python standard library as bytes, in the order of a seed."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    held_out = self._open(0)[1]
    assert held_out is not None
    # From all over it, as files stand one after the other. Trials choose by
    # other sequences than those that runs are judged by.
    self.validation = _spread(held_out, rows=(0, 8))
    self.probe = _spread(held_out, rows=(4, 12))

    self._train: dict[int, dataset_lib.Dataset] = {}

  def train(self, seed: int) -> dataset_lib.Dataset:
    """What is trained on, in the order of a seed."""
    if seed not in self._train:
      self._train[seed] = self._open(seed)[0]
    return self._train[seed]

  def _open(self, seed: int) -> Any:
    config = pipeline.DataConfig(
      sequence_length=SEQUENCE_LENGTH, batch_size=BATCH_SIZE, seed=seed
    )
    return datasets.open_both(config, cache_dir=self._folder)


@dataclasses.dataclass(frozen=True)
class Grown:
  """A large model's beginning and what it cost.

  Attributes:
    state: Of step 0.
    operator_flops: Of learning, the map included.
    operator_secs: Of learning, without compilation.
    function_error: Largest difference of logits from the small model's, as a
      share of the largest logit. Where new width is at rest, with the epsilon
      of norms that `methods.loss_of_function` asks for.
    claimed: Whether the method says that the function is kept.
  """

  state: state_lib.TrainState
  operator_flops: float
  operator_secs: float
  function_error: float
  claimed: bool


@dataclasses.dataclass(frozen=True)
class Run:
  """What a training run showed.

  Attributes:
    state: At its end, with averaged parameters.
    steps: At which it was evaluated, 0 first.
    losses: Validation losses of averaged parameters, in nats a byte.
    secs: Of training until then, without compilation and evaluation.
    probe_loss: After the first chunk, on other text, not averaged.
    probe_secs: Of the first chunk.
  """

  state: state_lib.TrainState
  steps: list[int]
  losses: list[float]
  secs: list[float]
  probe_loss: float
  probe_secs: float


@dataclasses.dataclass(frozen=True)
class Course:
  """How steps differ from plain training's.

  Attributes:
    resting_layers: Those that are not trained.
    sub_model_layers: As `LigoConfig.sub_model_layers`.
    inherit: How the small model teaches.
    small: The small model, where it does.
  """

  resting_layers: tuple[int, ...] = ()
  sub_model_layers: int | None = None
  inherit: ligo_config.InheritConfig = ligo_config.InheritConfig()
  small: TransformerConfig | None = None


class Lab:
  """One device with its programs."""

  def __init__(self, device: Any, texts: Texts):
    self._device, self._texts = device, texts
    self._mesh = sharding.make_mesh(
      sharding.MeshConfig(data=1, fsdp=1), devices=[device]
    )
    self._programs: dict[Any, Callable[..., Any]] = {}

  def first_state(
    self,
    model: TransformerConfig,
    optimizer: optimizer_lib.OptimizerConfig,
    *,
    num_steps: int,
    seed: int,
  ) -> state_lib.TrainState:
    """New parameters."""
    parts = self._parts(model, optimizer, num_steps)
    with jax.default_device(self._device):
      return jax.jit(parts.init_state)(jax.random.key(seed))

  def structure(
    self,
    model: TransformerConfig,
    optimizer: optimizer_lib.OptimizerConfig,
    *,
    num_steps: int,
  ) -> Any:
    """The tree of the state that `first_state` makes."""
    parts = self._parts(model, optimizer, num_steps)
    shapes = jax.eval_shape(parts.init_state, jax.random.key(0))
    return jax.tree.structure(shapes)

  def train(
    self,
    model: TransformerConfig,
    optimizer: optimizer_lib.OptimizerConfig,
    state: state_lib.TrainState,
    *,
    num_steps: int,
    seed: int,
    until: float = 0.0,
    restart_at: int | None = None,
    course: Course = Course(),
    teacher: Any = None,
  ) -> Run:
    """Trains on the text in the order of a seed.

    Args:
      model: What is trained.
      optimizer: With its schedule.
      state: Where it begins.
      num_steps: At most.
      seed: Of the order.
      until: Loss at which it may end.
      restart_at: Step at which moments and schedule begin anew.
      course: How steps differ from plain ones.
      teacher: Parameters of `course.small`.
    """
    dataset = self._texts.train(seed)
    state = jax.device_put(state, self._device)
    average = jax.tree.map(jnp.copy, state.params)
    config = _config(model, optimizer, num_steps, course)
    teacher = jax.device_put(teacher, self._device)
    chunk = self._chunk(config, course.small, (state, average, teacher))
    steps, losses, secs = [0], [self.loss(model, state.params)], [0.0]
    total = probe_secs = probe_loss = 0.0
    for step in range(0, num_steps, CHUNK):
      if step == restart_at:
        parts = self._parts(model, optimizer, num_steps)
        fresh = jax.jit(parts.init_state)(jax.random.key(seed))
        fresh = fresh.replace(params=state.params)
        state = jax.device_put(fresh, self._device)
      batches = jax.device_put(
        _stack(dataset, range(step, step + CHUNK)), self._device
      )
      start = time.perf_counter()
      state, average = chunk(state, average, teacher, batches, jnp.int32(step))
      jax.block_until_ready(average)
      total += time.perf_counter() - start
      if not step:
        probe_loss = self.loss(model, state.params, self._texts.probe)
        probe_secs = total
      if (step + CHUNK) % _EVAL_EVERY == 0 or step + CHUNK >= num_steps:
        steps.append(step + CHUNK)
        losses.append(self.loss(model, average))
        secs.append(total)
        if losses[-1] <= until:
          break
    state = state.replace(params=average)
    return Run(state, steps, losses, secs, probe_loss, probe_secs)

  def grow(
    self,
    method: str,
    small: TransformerConfig,
    large: TransformerConfig,
    state: state_lib.TrainState,
    *,
    learn: ligo_config.LearnConfig,
    optimizer: optimizer_lib.OptimizerConfig,
    num_steps: int,
    seed: int,
    moments: bool = False,
    beside: bool = False,
  ) -> Grown:
    """Makes the large model's state of a small one's.

    Args:
      method: Name of `methods.METHODS`.
      small: The small model.
      large: The large model.
      state: Of the small model, at its end.
      learn: Whether and how the operator is learned.
      optimizer: Of the large model's training.
      num_steps: Of the same.
      seed: Of copies, noise and the text that the operator learns from.
      moments: Whether they grow too.
      beside: Whether what the operator makes is trained while it is learned.
    """
    setting = methods.get(method)
    state = jax.device_put(state, self._device)
    made = optimizer_lib.make_optimizer(
      optimizer, transformer.logical_axes(large), num_steps=num_steps
    )
    with jax.default_device(self._device), jax.set_mesh(self._mesh):
      begin = methods.build(setting, small, large, seed=seed)
      operator, flops, secs = begin, 0.0, 0.0
      if learn.num_steps:
        operator, flops, secs = self._learn(
          learn,
          small,
          large,
          begin,
          state.params,
          seed=seed,
          beside=made if beside else None,
        )
      grown = growth_state.grow(
        small,
        state,
        operator,
        made,
        key=jax.random.key(seed),
        moments=moments,
      )
      claimed = not learn.num_steps and (
        methods.loss_of_function(setting, small, large) is None
      )
      at_rest = setting.width in ('zero', 'average')
      scale = small.embed_dim / large.embed_dim if at_rest else 1.0
      judged = dataclasses.replace(
        large, norm_epsilon=scale * small.norm_epsilon
      )
      error = self._function_error(small, judged, state.params, grown.params)
    return Grown(grown, flops, secs, error, claimed)

  def loss(
    self, model: TransformerConfig, params: Any, text: Any = None
  ) -> float:
    """Mean loss on held-out text, in nats a byte."""
    key = ('loss', model)
    if key not in self._programs:
      loss_fn = objectives.language_model_loss(model)

      def total(params: Any, batches: Any) -> Any:
        def one(batch: Any) -> Any:
          loss = loss_fn(params, batch, jax.random.key(0))
          return loss.total, loss.weight

        totals, weights = jax.lax.map(one, batches)
        return totals.sum() / weights.sum()

      self._programs[key] = jax.jit(total)
    text = self._texts.validation if text is None else text
    return float(
      self._programs[key](params, jax.device_put(text, self._device))
    )

  def _parts(
    self,
    model: TransformerConfig,
    optimizer: optimizer_lib.OptimizerConfig,
    num_steps: int,
  ) -> pretrain.Parts:
    config = _config(model, optimizer, num_steps, Course())
    return pretrain.make_parts(config, self._mesh)

  def _chunk(
    self,
    config: ligo_config.LigoConfig,
    small: TransformerConfig | None,
    example: tuple[Any, Any, Any],
  ) -> Callable[..., Any]:
    """(state, average, teacher, batches, step) -> (state, average)."""
    key = ('chunk', config, small)
    if key not in self._programs:
      train_step = self._step(config, small)

      def chunk(
        state: Any, average: Any, teacher: Any, batches: Any, first: Any
      ) -> Any:
        def body(carry: Any, inputs: Any) -> Any:
          state, average = carry
          batch, place = inputs
          state, _ = train_step(state, batch, teacher)
          # Young averages must forget where they began.
          keep = jnp.minimum(_EMA, (1.0 + place) / (10.0 + place))
          average = jax.tree.map(
            lambda a, p: keep * a + (1 - keep) * p, average, state.params
          )
          return (state, average), None

        places = first + jnp.arange(CHUNK)
        carry, _ = jax.lax.scan(body, (state, average), (batches, places))
        return carry

      batches = jax.device_put(
        _stack(self._texts.train(0), range(CHUNK)), self._device
      )
      self._programs[key] = (
        jax.jit(chunk, donate_argnums=(0, 1))
        .lower(*example, batches, jnp.int32(0))
        .compile()
      )
    return self._programs[key]

  def _step(
    self, config: ligo_config.LigoConfig, small: TransformerConfig | None
  ) -> inheritance.TaughtStep:
    """The step of a course, that every course has in common."""
    if small is not None:
      return inheritance.train_step(config, small, config.model)
    if config.sub_model_layers is not None:
      plain = sub_models.train_step(config, config.model)
    else:
      plain = pretrain.make_parts(config, self._mesh).train_step
    return lambda state, batch, _: plain(state, batch)

  def _learn(
    self,
    config: ligo_config.LearnConfig,
    small: TransformerConfig,
    large: TransformerConfig,
    begin: operator_lib.Operator,
    params: Any,
    *,
    seed: int,
    beside: optimizer_lib.Optimizer | None = None,
  ) -> tuple[operator_lib.Operator, float, float]:
    """The learned operator, its FLOPs and seconds.

    With `beside`, what is added to the grown parameters is trained by that
    optimiser at the same time, in the same steps.
    """
    program = learning.build(config, small, large, begin, self._mesh)
    # Other text than that the large model begins with.
    dataset = self._texts.train(seed + 1000)
    rows = config.batch_size or BATCH_SIZE

    def batch_of(step: int) -> Any:
      batch = _stack(dataset, [step])
      return jax.device_put(
        jax.tree.map(lambda x: x[0, :rows], batch), self._device
      )

    state = program.first_state()
    step: Any = program.learn_step
    if beside is not None:
      step, state = _joint_step(config, small, large, begin, program, beside)
    compiled = step.lower(state, batch_of(0), params).compile()
    secs = 0.0
    for place in range(config.num_steps):
      batch = batch_of(place)
      start = time.perf_counter()
      state, metrics = compiled(state, batch, params)
      jax.block_until_ready(metrics)
      secs += time.perf_counter() - start
    # Forward and backward of the map are three times it.
    mapped = jax.jit(functools.partial(operator_lib.grow, small)).lower(
      params, begin
    )
    costs: Any = mapped.cost_analysis()
    flops = 3 * float(costs['flops'])
    flops += rows * SEQUENCE_LENGTH * flops_per_token(large)
    flops *= config.num_steps
    if beside is not None:
      operator = program.operator(state.params['operator'])
      added = state.params['added']
      return dataclasses.replace(operator, added=added), flops, secs
    return program.operator(state.params), flops, secs

  def _function_error(
    self,
    small: TransformerConfig,
    large: TransformerConfig,
    params: Any,
    grown: Any,
  ) -> float:
    """As `Grown` has it."""
    tokens_BT = jnp.asarray(self._texts.validation['tokens'][0, :2])
    theirs = transformer.apply(small, params, tokens_BT).logits
    ours = transformer.apply(large, grown, tokens_BT).logits
    assert ours is not None
    assert theirs is not None
    return float(abs(ours - theirs).max() / abs(theirs).max())


def _joint_step(
  config: ligo_config.LearnConfig,
  small: TransformerConfig,
  large: TransformerConfig,
  begin: operator_lib.Operator,
  program: learning.Program,
  beside: optimizer_lib.Optimizer,
) -> tuple[Any, state_lib.TrainState]:
  """A step of the operator and of what is added to it, and the first state."""
  loss = objectives.language_model_loss(large)
  of_operator = optimizer_lib.make_optimizer(
    config.optimizer,
    jax.tree.map(lambda _: typing.LogicalAxes(), program.abstract_state.params),
    num_steps=config.num_steps,
  )
  added = begin.added
  if added is None:
    shapes = transformer.abstract_params(large)
    added = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  params = {'operator': program.first_state().params, 'added': added}
  transforms: dict[str, Any] = {
    'operator': of_operator.transform,
    'added': beside.transform,
  }

  def update(grads: Any, states: Any, params: Any = None) -> Any:
    found = {
      name: transform.update(grads[name], states[name], params[name])
      for name, transform in transforms.items()
    }
    return (
      {name: updates for name, (updates, _) in found.items()},
      {name: after for name, (_, after) in found.items()},
    )

  def init(params: Any) -> Any:
    return {name: t.init(params[name]) for name, t in transforms.items()}

  joint: Any = optax.GradientTransformation
  both = optimizer_lib.Optimizer(joint(init, update), beside.schedule)

  def joint_step(
    state: state_lib.TrainState, batch: Any, small_params: Any
  ) -> Any:
    def total(params: Any, batch: Any, key: Any) -> objectives.Loss:
      operator = dataclasses.replace(
        program.operator(params['operator']), added=params['added']
      )
      grown = operator_lib.grow(small, small_params, operator)
      return loss(grown, batch, key)

    return step_lib.make_train_step(total, both)(state, batch)

  state = state_lib.create(params, both, jax.random.key(0))
  return jax.jit(joint_step, donate_argnums=0), state


def _config(
  model: TransformerConfig,
  optimizer: optimizer_lib.OptimizerConfig,
  num_steps: int,
  course: Course,
) -> ligo_config.LigoConfig:
  return ligo_config.LigoConfig(
    model=model,
    optimizer=optimizer,
    loop=pretrain.loop_lib.LoopConfig(num_steps=num_steps),
    data=pipeline.DataConfig(
      sequence_length=SEQUENCE_LENGTH, batch_size=BATCH_SIZE
    ),
    resting_layers=course.resting_layers,
    sub_model_layers=course.sub_model_layers,
    inherit=course.inherit,
  )


def step_flops(model: TransformerConfig, course: Course = Course()) -> float:
  """Of a training step; without a teacher's."""
  config = _config(model, optimizer_lib.OptimizerConfig(), 1, course)
  return BATCH_SIZE * SEQUENCE_LENGTH * config.flops_per_token


def flops_per_token(model: TransformerConfig) -> float:
  """Of training."""
  return transformer.flops_per_token(model, num_tokens=SEQUENCE_LENGTH)


def _spread(dataset: dataset_lib.Dataset, *, rows: tuple[int, ...]) -> Any:
  """So many batches of sequences that are far from each other."""
  count = _EVAL_BATCHES * BATCH_SIZE // len(rows)
  places = np.linspace(0, dataset.steps_per_pass - 1, count).astype(int)
  batches = _stack(dataset, places.tolist())
  return jax.tree.map(
    lambda x: x[:, list(rows)].reshape(_EVAL_BATCHES, BATCH_SIZE, *x.shape[2:]),
    batches,
  )


def _stack(dataset: dataset_lib.Dataset, steps: Sequence[int]) -> Any:
  batches = [dataset.batch_at(step) for step in steps]
  return jax.tree.map(lambda *x: np.stack(x), *batches)
