"""The only training loop: steps, metrics, evaluation, checkpoints, signals."""

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import jax
from absl import logging

from efficient_llm import typing
from efficient_llm.training import checkpoint as checkpoint_lib
from efficient_llm.training import hardware, metrics, progress, signals
from efficient_llm.training.state import TrainState

# The device always has this many steps queued; more would only hide failures.
_STEPS_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """Length of a run and what happens on the way.

  Attributes:
    num_steps: Updates in all.
    num_microbatches: Parts a batch is worked off in (gradient accumulation).
    log_every: Steps between two lines of metrics.
    eval_every: Steps between two evaluations; None for the end only.
    eval_batches: Validation batches per evaluation; None for all.
    nonfinite: A loss or gradient that is not finite stops the run, or its
      batch is skipped.
    profile_steps: 'first:last' writes a profiler trace of these steps.
    tensorboard: Mirror metrics to TensorBoard.
    wandb_project: Mirror metrics to this Weights & Biases project.
    checkpoint: When checkpoints are made and which are kept.
  """

  num_steps: int = 1000
  num_microbatches: int = 1
  log_every: int = 10
  eval_every: int | None = 100
  eval_batches: int | None = 16
  nonfinite: Literal['stop', 'skip'] = 'stop'
  profile_steps: str | None = None
  tensorboard: bool = True
  wandb_project: str | None = None
  checkpoint: checkpoint_lib.CheckpointConfig = checkpoint_lib.CheckpointConfig()

  def validate(self) -> None:
    """Checks ranges; raises ValueError with one line."""
    for name in (
      'num_steps',
      'num_microbatches',
      'log_every',
      'eval_every',
      'eval_batches',
    ):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'loop.{name}={value} must be at least 1; raise it.')
    if self.profile_steps is not None:
      self.profile_range()
    self.checkpoint.validate()

  def profile_range(self) -> tuple[int, int] | None:
    """First and last profiled step."""
    if self.profile_steps is None:
      return None
    first, _, last = self.profile_steps.partition(':')
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
      raise ValueError(
        f'profile_steps={self.profile_steps!r} must be two rising step '
        'numbers; for example 10:13.'
      )
    return int(first), int(last)


class BatchSource(Protocol):
  """An iterator of batches that knows where it stands."""

  def __next__(self) -> Mapping[str, Any]: ...

  def get_state(self) -> dict[str, Any]:
    """Where it stands, as JSON can hold it."""
    ...

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes back there."""
    ...


class NonFiniteError(RuntimeError):
  """A loss or gradient was not finite."""


@dataclasses.dataclass(frozen=True)
class Task:
  """What is trained: the parts that techniques supply.

  Attributes:
    title: Short name shown beside the progress.
    step: (state, batch) -> (state, metrics); metrics hold scalars, among them
      'loss', 'tokens' and 'finite'.
    batches: Where batches come from.
    place: Puts a batch on the devices.
    evaluate: Gives validation metrics of a state, or None.
    metadata: What a checkpoint says about itself (configuration, model).
    flops_per_token: For the model FLOPs utilisation; None leaves it out.
  """

  title: str
  step: Callable[[Any, Any], tuple[Any, typing.Metrics]]
  batches: BatchSource
  place: Callable[[Any], Any]
  evaluate: Callable[[Any], Mapping[str, float]] | None = None
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  flops_per_token: float | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Attributes:
    state: The last state.
    stopped_by: Name of the signal that ended it early, or None.
    num_tokens: Target tokens trained on, resumed parts included.
    train_secs: Seconds spent in steps, without compilation, evaluation and
      checkpoints, resumed parts included.
    eval_metrics: The last evaluation.
  """

  state: Any
  stopped_by: str | None
  num_tokens: float
  train_secs: float
  eval_metrics: Mapping[str, float]


def run(
  config: LoopConfig,
  task: Task,
  *,
  make_state: Callable[[], Any],
  abstract_state: Any,
  workdir: str | pathlib.Path,
) -> Outcome:
  """Trains until `num_steps`, continuing where the working directory stands.

  Args:
    config: Settings.
    task: What is trained.
    make_state: Makes the state of step 0 where there is no checkpoint.
    abstract_state: Shapes, dtypes and shardings to restore into.
    workdir: Holds metrics.jsonl, tensorboard/, checkpoints/.
  Raises:
    NonFiniteError: If a loss is not finite and the configuration says stop.
    ValueError: If the checkpoint is of another model or another data set.
  """
  workdir = pathlib.Path(workdir)
  with contextlib.ExitStack() as stack:
    saver = checkpoint_lib.Checkpointer(workdir / 'checkpoints', config.checkpoint)
    stack.callback(saver.close)
    writer = metrics.MetricWriter(
      workdir,
      tensorboard=config.tensorboard,
      wandb_project=config.wandb_project,
      primary=jax.process_index() == 0,
      config=task.metadata,
    )
    stack.callback(writer.close)
    stop = stack.enter_context(signals.StopRequest())
    restored = saver.restore(abstract_state)
    runner = _Run(config, task, saver, writer, workdir)
    if restored is None:
      writer.rewind(0)
      state = make_state()
    else:
      state = runner.resume(restored)
    return runner.run(state, stop)


class _Run:
  """One call of `run`."""

  def __init__(
    self,
    config: LoopConfig,
    task: Task,
    saver: checkpoint_lib.Checkpointer,
    writer: metrics.MetricWriter,
    workdir: pathlib.Path,
  ) -> None:
    self._config, self._task, self._workdir = config, task, workdir
    self._saver, self._writer = saver, writer
    self._meter = progress.RateMeter()
    self._peak: hardware.Peak | None = None
    self._pending: collections.deque[tuple[int, typing.Metrics]] = (
      collections.deque()
    )
    self._num_tokens = 0.0
    self._train_secs = 0.0
    self._last_flush: float | None = None
    self._eval_metrics: Mapping[str, float] = {}
    self._shown: dict[str, str | float] = {}

  def resume(self, restored: checkpoint_lib.Restored) -> Any:
    """Takes over a checkpoint and says from where training goes on."""
    self._task.batches.set_state(restored.data_state or {})
    self._writer.rewind(restored.step)
    counters = restored.metadata['counters']
    self._num_tokens = counters['num_tokens']
    self._train_secs = counters['train_secs']
    logging.info(
      'Resumed at step %d of %d; next example: %s.',
      restored.step,
      self._config.num_steps,
      (restored.data_state or {}).get('next_example', 'unknown'),
    )
    changes = differences(
      restored.metadata.get('config', {}), self._task.metadata.get('config', {})
    )
    for change in changes:
      logging.warning('Configuration changed since the checkpoint: %s', change)
    return restored.state

  def run(self, state: TrainState, stop: signals.StopRequest) -> Outcome:
    config = self._config
    done = int(state.step)
    if self._task.flops_per_token is not None:
      self._peak = hardware.peak_flops(jax.devices())
    profiler = _Profiler(config.profile_range(), self._workdir)
    with progress.Progress(
      config.num_steps,
      title=self._task.title,
      start_step=done,
      meter=self._meter,
      primary=jax.process_index() == 0,
    ) as shown, profiler:
      is_first = True
      while done < config.num_steps and not stop.is_set(done):
        profiler.before(done + 1)
        batch = self._task.place(next(self._task.batches))
        # The first call compiles, which is not training time.
        with self._meter.pause() if is_first else contextlib.nullcontext():
          state, step_metrics = self._task.step(state, batch)
          if is_first:
            jax.block_until_ready(step_metrics)
            self._last_flush = time.monotonic()
        is_first = False
        done += 1
        self._pending.append((done, step_metrics))
        self._wait_for_queue()
        if done % config.log_every == 0 or done == config.num_steps:
          self._flush(done)
        shown.update(done, self._shown)
        is_last = done == config.num_steps
        every = config.eval_every
        if is_last or (every is not None and done % every == 0):
          self._evaluate(done, state, shown)
        if is_last or done % config.checkpoint.every_steps == 0:
          self._save(done, state)
      if self._pending or done < config.num_steps:
        self._flush(done)
        self._save(done, state)
      self._saver.wait()
    if is_first and self._task.evaluate is not None:
      # A finished run that is started again still reports its figures.
      self._eval_metrics = self._task.evaluate(state)
    return Outcome(
      state=state,
      stopped_by=stop.signal_name if done < config.num_steps else None,
      num_tokens=self._num_tokens,
      train_secs=self._train_secs,
      eval_metrics=self._eval_metrics,
    )

  def _wait_for_queue(self) -> None:
    if len(self._pending) > _STEPS_IN_FLIGHT:
      jax.block_until_ready(self._pending[-1 - _STEPS_IN_FLIGHT][1])

  def _flush(self, done: int) -> None:
    """Fetches the queued metrics, checks and writes them."""
    steps = [step for step, _ in self._pending]
    if not steps:
      return
    fetched = jax.device_get([values for _, values in self._pending])
    self._pending.clear()
    now = time.monotonic()
    secs = now - (self._last_flush or now)
    self._last_flush = now
    for step, values in zip(steps, fetched, strict=True):
      self._check(step, values)
    self._train_secs += secs
    tokens = sum(float(values['tokens']) for values in fetched)
    self._num_tokens += tokens
    self._meter.update(done, num_tokens=int(self._num_tokens))
    mean = {
      name: sum(float(values[name]) for values in fetched) / len(fetched)
      for name in fetched[0]
      if name not in ('finite', 'tokens')
    }
    line = {
      **mean,
      'learning_rate': float(fetched[-1].get('learning_rate', 0.0)),
      'tokens': self._num_tokens,
      'step_secs': secs / len(steps),
      'skipped': sum(not values['finite'] for values in fetched),
    }
    rate = self._meter.tokens_per_sec
    if rate is not None:
      line['tokens_per_sec'] = rate
      if self._peak is not None and self._task.flops_per_token is not None:
        flops = rate * self._task.flops_per_token
        line['mfu'] = flops / self._peak.flops_per_sec
    self._writer.write(done, line)
    self._shown |= {
      name: line[name]
      for name in ('loss', 'reward', 'tokens_per_sec', 'mfu')
      if name in line
    }

  def _check(self, step: int, values: typing.Metrics) -> None:
    if values['finite'] or self._config.nonfinite == 'skip':
      return
    good = self._saver.latest_step()
    remedy = (
      f'the last good checkpoint is step {good}'
      if good is not None
      else 'there is no earlier checkpoint'
    )
    raise NonFiniteError(
      f'loss={float(values["loss"])} or its gradient is not finite at {step=}; '
      f'{remedy}; lower optimizer.learning_rate or set loop.nonfinite=skip.'
    )

  def _evaluate(
    self, done: int, state: Any, shown: progress.Progress
  ) -> None:
    if self._task.evaluate is None:
      return
    with self._paused():
      self._eval_metrics = self._task.evaluate(state)
    self._writer.write(
      done, {**self._eval_metrics, 'tokens': self._num_tokens}, kind='eval'
    )
    self._shown |= {
      f'val {name}': value
      for name, value in self._eval_metrics.items()
      if name == 'loss'
    }
    shown.update(done, self._shown)

  def _save(self, done: int, state: Any) -> None:
    """Saves, but never a state that a bad step has spoilt."""
    self._flush(done)
    with self._paused():
      self._saver.save(
        done,
        state,
        data_state=self._task.batches.get_state(),
        metadata={
          **self._task.metadata,
          'counters': {
            'num_tokens': self._num_tokens,
            'train_secs': self._train_secs,
          },
        },
      )

  @contextlib.contextmanager
  def _paused(self) -> Iterator[None]:
    """Time inside counts neither as training nor in any rate."""
    if self._pending:
      jax.block_until_ready(self._pending[-1][1])
    start = time.monotonic()
    with self._meter.pause():
      yield
    if self._last_flush is not None:
      self._last_flush += time.monotonic() - start


class _Profiler:
  """Traces a range of steps with jax.profiler."""

  def __init__(
    self, steps: tuple[int, int] | None, workdir: pathlib.Path
  ) -> None:
    self._steps, self._workdir = steps, workdir
    self._is_on = False

  def __enter__(self) -> None: ...

  def __exit__(self, *exc_info: object) -> None:
    self._stop()

  def before(self, step: int) -> None:
    if self._steps is None:
      return
    first, last = self._steps
    if step == first:
      jax.profiler.start_trace(str(self._workdir / 'profile'))
      self._is_on = True
    elif step == last:
      self._stop()

  def _stop(self) -> None:
    if self._is_on:
      jax.profiler.stop_trace()
      self._is_on = False
      logging.info('Wrote a profile to %s.', self._workdir / 'profile')


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ''
) -> list[str]:
  """Fields of two nested configurations that differ, as 'name: a -> b'."""
  lines = []
  for name in sorted({*old, *new}):
    before, after = old.get(name), new.get(name)
    if isinstance(before, Mapping) and isinstance(after, Mapping):
      lines += differences(before, after, f'{prefix}{name}.')
    elif before != after:
      lines.append(f'{prefix}{name}: {before} -> {after}')
  return lines
