"""The only training loop: steps, metrics, evaluation, checkpoints, signals."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
from absl import logging

from efficient_llm.training import checkpoint as checkpoint_lib
from efficient_llm.training import (
  hardware,
  metrics,
  profiler,
  progress,
  signals,
  step_metrics,
)
from efficient_llm.training import task as task_lib
from efficient_llm.training.state import TrainState

BatchSource = task_lib.BatchSource
Outcome = task_lib.Outcome
Task = task_lib.Task


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """Length of a run and what happens on the way.

  Attributes:
    num_steps: Updates in all.
    num_microbatches: Parts a batch is worked off in (gradient accumulation).
    log_every: Steps between two lines of metrics.
    eval_every: Steps between two evaluations; None for the end only.
    eval_batches: Validation batches per evaluation; None for all.
    eval_first: Whether there is an evaluation before the first step.
    nonfinite: A loss or gradient that is not finite stops the run, or its
      batch is skipped.
    profile_steps: 'first:last' writes a profiler trace of these steps, both
      included.
    tensorboard: Mirror metrics to TensorBoard.
    wandb_project: Mirror metrics to this Weights & Biases project.
    checkpoint: When checkpoints are made and which are kept.
  """

  num_steps: int = 1000
  num_microbatches: int = 1
  log_every: int = 10
  eval_every: int | None = 100
  eval_batches: int | None = 16
  eval_first: bool = False
  nonfinite: Literal['stop', 'skip'] = 'stop'
  profile_steps: str | None = None
  tensorboard: bool = True
  wandb_project: str | None = None
  checkpoint: checkpoint_lib.CheckpointConfig = (
    checkpoint_lib.CheckpointConfig()
  )

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
    profiled = profiler.parse_range(self.profile_steps)
    if profiled is not None and profiled[1] > self.num_steps:
      raise ValueError(
        f'profile_steps={self.profile_steps!r} must not go beyond '
        f'loop.num_steps={self.num_steps}; name earlier steps.'
      )
    self.checkpoint.validate()


class NonFiniteError(RuntimeError):
  """A loss or gradient was not finite."""


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
    saver = checkpoint_lib.Checkpointer(
      workdir / 'checkpoints', config.checkpoint
    )
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
    self._steps = step_metrics.StepMetrics(self._check, task.read)
    self._peak: hardware.Peak | None = None
    self._eval_metrics: Mapping[str, float] = {}
    self._shown: dict[str, str | float] = {}

  def resume(self, restored: checkpoint_lib.Restored) -> Any:
    """Takes over a checkpoint and says from where training goes on."""
    data_state = restored.data_state or {}
    self._task.batches.set_state(data_state)
    self._writer.rewind(restored.step)
    self._steps.set_state(restored.metadata['counters'])
    logging.info(
      'Resumed at step %d of %d; next example: %s.',
      restored.step,
      self._config.num_steps,
      data_state.get('next_example', 'unknown'),
    )
    changes = differences(
      restored.metadata.get('config', {}), self._task.metadata.get('config', {})
    )
    for change in changes:
      logging.warning('Configuration changed since the checkpoint: %s', change)
    return restored.state

  def run(self, state: TrainState, stop: signals.StopRequest) -> Outcome:
    config = self._config
    start = done = int(state.step)
    if self._task.flops_per_token is not None:
      self._peak = hardware.peak_flops(jax.devices())
    profiled = profiler.parse_range(config.profile_steps)
    with (
      progress.Progress(
        config.num_steps,
        title=self._task.title,
        unit=self._task.unit,
        start_step=done,
        meter=self._meter,
        primary=jax.process_index() == 0,
      ) as shown,
      profiler.Profiler(profiled, self._workdir / 'profile') as trace,
    ):
      if config.eval_first and done == 0:
        self._evaluate(0, state)
      while done < config.num_steps and not stop.is_set(done):
        trace.before(done + 1, state)
        state = self._train_step(done + 1, state, is_first=done == start)
        done += 1
        is_last = done == config.num_steps
        if is_last or done % config.log_every == 0:
          self._write_line(done)
        shown.update(done, self._shown)
        every = config.eval_every
        if is_last or (every is not None and done % every == 0):
          self._evaluate(done, state)
          shown.update(done, self._shown)
        if is_last or done % config.checkpoint.every_steps == 0:
          self._save(done, state)
      if done < config.num_steps:
        self._save(done, state)
      self._saver.wait()
    if start >= config.num_steps and self._task.evaluate is not None:
      # A finished run that is started again still reports its figures.
      self._eval_metrics = self._task.evaluate(state)
    return Outcome(
      state=state,
      stopped_by=stop.signal_name if done < config.num_steps else None,
      num_tokens=self._steps.num_tokens,
      train_secs=self._steps.train_secs,
      eval_metrics=self._eval_metrics,
    )

  def _train_step(self, step: int, state: Any, *, is_first: bool) -> Any:
    """Starts a step; the device may be at an earlier one still."""
    batch = self._task.place(next(self._task.batches))
    # The first call compiles, which is not training time.
    with self._meter.pause() if is_first else contextlib.nullcontext():
      state, values = self._task.step(state, batch)
      if is_first:
        jax.block_until_ready(values)
    self._steps.push(step, values)
    self._steps.start_clock()
    return state

  def _write_line(self, done: int) -> None:
    self._steps.fetch()
    self._meter.update(done, num_tokens=int(self._steps.num_tokens))
    line = self._steps.line()
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

  def _check(self, step: int, values: Mapping[str, Any]) -> None:
    if values['finite'] or self._config.nonfinite == 'skip':
      return
    self._saver.wait()
    good = self._saver.latest_step()
    remedy = 'there is no earlier checkpoint'
    if good is not None:
      remedy = f'the last good checkpoint is step {good}'
    raise NonFiniteError(
      f'loss={float(values["loss"])} or its gradient is not finite at {step=}; '
      f'{remedy}; lower optimizer.learning_rate or set loop.nonfinite=skip.'
    )

  def _evaluate(self, done: int, state: Any) -> None:
    if self._task.evaluate is None:
      return
    self._steps.fetch()
    with self._paused():
      self._eval_metrics = self._task.evaluate(state)
    line = {**self._eval_metrics, 'tokens': self._steps.num_tokens}
    self._writer.write(done, line, kind='eval')
    if 'loss' in self._eval_metrics:
      self._shown['val loss'] = self._eval_metrics['loss']

  def _save(self, done: int, state: Any) -> None:
    """Saves, but never a state that a bad step has spoilt."""
    self._steps.fetch()
    with self._paused():
      self._saver.save(
        done,
        state,
        data_state=self._task.batches.get_state(),
        metadata={**self._task.metadata, 'counters': self._steps.get_state()},
      )

  @contextlib.contextmanager
  def _paused(self) -> Iterator[None]:
    """Time inside counts neither as training nor in any rate."""
    with self._meter.pause(), self._steps.pause():
      yield


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
