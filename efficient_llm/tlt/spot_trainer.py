"""Trains the drafter in time that is left over, a step at a time.

Workers without answers call `train_until`; asked to, it stops within a step.
"""

import dataclasses
import threading
import time
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding, typing
from efficient_llm.models import transformer
from efficient_llm.speculative import drafter, drafter_form, drafter_program
from efficient_llm.tlt import drafter_data, idle, spot_config
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import state as state_lib

# More than a run will ever make; schedules that end are not for idle time.
_NUM_STEPS = 10_000_000
_WAIT_SECS = 0.05


@dataclasses.dataclass
class Effort:
  """What was done in one step of the run.

  Attributes:
    num_steps: Of drafter training.
    secs: Spent in them, without compilation.
    acceptance: Of the first token of a draft, at the last training step.
    num_published: Drafters that workers could take up.
  """

  num_steps: int = 0
  secs: float = 0.0
  acceptance: float = float('nan')
  num_published: int = 0


class SpotTrainer:
  """The drafter's training state and data; one worker at a time trains.

  Attributes:
    data: Answers of this step of the run and the one before.
    version: Counts published drafters.
    is_ready: Whether it has a drafter.
    is_healthy: False from a loss, update or drafter on that is not finite: from
      then on nothing is trained or published, and nobody is to draft with it.
    staleness: Steps of the run since the drafter last learnt.
  """

  def __init__(
    self,
    config: spot_config.SpotConfig,
    model: transformer.TransformerConfig,
    *,
    sequence_length: int,
    pad_id: int,
    seed: int,
  ):
    """Prepares training; `restore` gives it a drafter.

    Args:
      config: Checked here.
      model: The policy.
      sequence_length: Tokens in a row; holds the longest answer.
      pad_id: Of the tokenizer.
      seed: Of the choice of answers.
    """
    config.validate()
    self._config, self._model = config, model
    self.data = drafter_data.DrafterData(
      batch_size=config.batch_size,
      sequence_length=sequence_length,
      pad_id=pad_id,
      max_texts=config.max_texts,
      seed=seed,
    )
    self._programs: dict[Any, drafter_program.Program] = {}
    self._lock = threading.Lock()
    self._publish_lock = threading.Lock()
    self._effort = Effort()
    self._idle, self._step_secs = idle.IdlePeriods(), 0.0
    self.version, self.staleness = 0, 0
    self.is_healthy, self.is_ready = True, False

  def init_state(self, params: typing.Params) -> state_lib.TrainState:
    """The training state of a drafter that was trained before."""
    optimizer = optimizer_lib.make_optimizer(
      self._config.optimizer,
      drafter.logical_axes(self._model, form=drafter_form.of(params)),
      num_steps=_NUM_STEPS,
    )
    return state_lib.create(params, optimizer, jax.random.key(0))

  def compile(self, policy: typing.Params, device: Any) -> None:
    """Compiles the step for a device, so that idle time is for training."""
    if self._config.mode == 'frozen' or not self.is_healthy:
      return
    state, placed = self._placed(policy, device)
    self._step(state, self.data.empty_batch(), placed, device)

  def restore(self, state: state_lib.TrainState) -> None:
    """Takes over a training state; publishes its parameters."""
    self._state = jax.device_get(state)
    self._published = self._state.params
    self.is_ready = True
    if not state_lib.are_finite(self._published):
      self._switch_off('the parameters it begins with are')

  @property
  def state(self) -> state_lib.TrainState:
    """As of now, numpy arrays."""
    return self._state

  def published(self) -> tuple[int, typing.Params]:
    """The newest drafter and its number."""
    with self._publish_lock:
      return self.version, self._published

  def begin(self, params: typing.Params) -> None:
    """Begins a step of the run.

    Args:
      params: The policy's, which the drafter is trained to foresee.
    """
    self._policy = params
    self._effort = Effort()
    self.staleness += 1
    self.data.begin_step()

  def train_until(self, ended: threading.Event, device: Any) -> None:
    """Trains in idle time until the event, if the mode is to do so.

    One worker at a time trains; others return at once.
    """
    if self._config.mode != 'adaptive':
      return
    if not self._lock.acquire(blocking=False):
      return
    try:
      self._train(device, ended, self._config.max_steps)
    finally:
      self._lock.release()

  def train_separately(self, params: typing.Params, device: Any) -> None:
    """The stage of its own, for the policy as it has become."""
    if self._config.mode == 'separate':
      self._policy = params
      self._train(device, threading.Event(), self._config.separate_steps)

  def take_effort(self) -> Effort:
    """What has been done since `begin`."""
    return self._effort

  def get_state(self) -> dict[str, Any]:
    """Data and counters, as JSON can hold them."""
    names = ('staleness', 'is_healthy')
    data = {'data': self.data.get_state()}
    return data | {name: getattr(self, name) for name in names}

  def set_state(self, saved: dict[str, Any]) -> None:
    """Goes on from `get_state`."""
    self.data.set_state(saved['data'])
    self.staleness = saved['staleness']
    self.is_healthy = saved['is_healthy']

  def _train(self, device: Any, ended: threading.Event, most: int) -> None:
    start, effort = time.perf_counter(), self._effort
    state, policy = self._placed(self._policy, device)
    # When the event was last known not to be set.
    latest = None
    while not ended.is_set() and self.is_healthy and effort.num_steps < most:
      latest = time.perf_counter()
      batch = self.data.batch() if self._may_train(latest - start) else None
      if batch is None:
        # A moment later an answer may have ended, or much time gone by.
        if ended.wait(_WAIT_SECS):
          latest = time.perf_counter()
        continue
      state, metrics = self._step(state, batch, policy, device)
      if not metrics['finite']:
        self._switch_off(f'loss={float(metrics["loss"])} or its update is')
        break
      effort.num_steps += 1
      effort.acceptance = float(metrics['acceptance_1'])
      if effort.num_steps % self._config.publish_every == 0:
        self._publish(state)
      self._step_secs = time.perf_counter() - latest
      effort.secs += self._step_secs
    if latest is not None and ended.is_set():
      # At some moment of what was begun last.
      self._idle.add((latest + time.perf_counter()) / 2 - start)
    if self.is_healthy and effort.num_steps % self._config.publish_every:
      self._publish(state)

  def _may_train(self, elapsed_secs: float) -> bool:
    """Whether nobody has to wait for a training step, or one is overdue."""
    if self._config.mode == 'separate':
      return True
    is_due = self.staleness > self._config.max_staleness
    if is_due and not self._effort.num_steps:
      return True
    return self._idle.has_room(elapsed_secs, self._step_secs)

  def _step(
    self,
    state: state_lib.TrainState,
    batch: typing.Batch,
    policy: typing.Params,
    device: Any,
  ) -> tuple[state_lib.TrainState, typing.Metrics]:
    program = self._program(device)
    # Another default device, in another thread, would compile it again.
    with jax.default_device(device), jax.set_mesh(_mesh(device)):
      placed = jax.device_put(dict(batch), program.batch_sharding)
      state, metrics = program.train_step(state, placed, policy)
    return state, jax.device_get(metrics)

  def _placed(
    self, policy: typing.Params, device: Any
  ) -> tuple[state_lib.TrainState, typing.Params]:
    """As the step's results lie, so that it is compiled once."""
    program = self._program(device)
    return jax.tree.map(
      lambda x, like: jax.device_put(x, like.sharding),
      (self._state, policy),
      (program.abstract_state, program.abstract_target),
    )

  def _publish(self, state: state_lib.TrainState) -> None:
    # Copied to the host, as the next step overwrites the device's.
    fetched = jax.device_get(state)
    if not state_lib.are_finite(fetched.params):
      self._switch_off('newly trained parameters are')
      return
    with self._publish_lock:
      self._state, self._published = fetched, fetched.params
      self.version += 1
      self.staleness = 0
      self._effort.num_published += 1

  def _switch_off(self, what: str) -> None:
    """Goes on without it; its state stays as it was before."""
    if self.is_healthy:
      self.is_healthy = False
      logging.error(
        'Drafter: %s not finite; it is switched off and the run goes on; lower '
        'drafter.optimizer.learning_rate or train another first_drafter.',
        what,
      )

  def _program(self, device: Any) -> drafter_program.Program:
    if device not in self._programs:
      config = drafter_program.DrafterConfig(
        form=drafter_form.of(self._state.params),
        loss=self._config.loss,
        optimizer=self._config.optimizer,
        # A step that is not finite changes nothing.
        loop=loop_lib.LoopConfig(num_steps=_NUM_STEPS, nonfinite='skip'),
      )
      self._programs[device] = drafter_program.build(
        config, self._model, _mesh(device)
      )
    return self._programs[device]


def _mesh(device: Any) -> Mesh:
  return sharding.make_mesh(sharding.MeshConfig(), devices=[device])
