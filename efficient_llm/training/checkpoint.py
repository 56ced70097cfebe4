"""Checkpoints that can be trusted: Orbax behind one file.

Nothing is restored from a folder that differs by a byte from the manifest of
hashes written when it was saved. One step in the directory:

    12/state/            the arrays, as Orbax stores them
    12/data_state.json   where the data iterator stands
    12/metadata.json     what else a reader needs, such as the model
    12/MANIFEST.json     every file's size and SHA-256, every array's shape
    13.partial/          being written, or left behind by a killed run
    damaged-11-0/        set aside: half-written, or no longer as saved

With several processes all of them make the same calls in the same order, on
a directory they share.
"""

import dataclasses
import json
import operator
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from concurrent import futures
from typing import Any

import jax

from efficient_llm.training import (
  array_store,
  manifest,
  processes,
  step_folders,
  strict_json,
  tree_names,
)

CheckpointError = step_folders.CheckpointError


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When checkpoints are made and which are kept.

  Attributes:
    every_steps: Steps between checkpoints. Counted in steps, not seconds,
      because every process must decide alike.
    max_to_keep: How many of the newest stay.
    keep_every_steps: Steps divisible by this stay for ever; None for none.
    asynchronous: Write while training goes on.
  """

  every_steps: int = 500
  max_to_keep: int = 3
  keep_every_steps: int | None = None
  asynchronous: bool = True

  def validate(self) -> None:
    """Raises ValueError if a number is below one."""
    for name in ('every_steps', 'max_to_keep', 'keep_every_steps'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(
          f'checkpoint.{name}={value} must be at least 1; raise it.'
        )


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a verified checkpoint held."""

  step: int
  state: Any
  data_state: dict[str, Any] | None
  metadata: dict[str, Any]


class Checkpointer:
  """Saves and restores one run's state; the only writer of its directory.

  Close it: a save under way when the interpreter ends does not count.
  """

  def __init__(
    self, directory: str | pathlib.Path, config: CheckpointConfig
  ) -> None:
    config.validate()
    self._directory = pathlib.Path(directory).absolute()
    self._config = config
    self._last_step: int | None = None
    self._pending: futures.Future[None] | None = None

    def prepare() -> None:
      self._directory.mkdir(parents=True, exist_ok=True)
      # Better refused now than after the first hours of training.
      with tempfile.TemporaryFile(dir=self._directory):
        pass
      step_folders.tidy(self._directory, max_to_keep=config.max_to_keep)

    try:
      processes.on_first(prepare, refusal=CheckpointError)
    except OSError as error:
      raise CheckpointError(
        'checkpoints need a writable directory: '
        f'{step_folders.one_line(error)}; use another --workdir.'
      ) from error
    self._arrays = array_store.Writer()
    self._thread = futures.ThreadPoolExecutor(1, 'checkpoint')

  def save(
    self,
    step: int,
    state: Any,
    *,
    data_state: Mapping[str, Any] | None,
    metadata: Mapping[str, Any],
  ) -> None:
    """Saves a checkpoint; buffers may be donated as soon as this returns.

    The files are written in the background unless `asynchronous` is off.
    Saving the step that was saved last once more does nothing.

    Args:
      step: Number of steps done.
      state: Tree of jax and numpy arrays; random keys as `random.key_data`.
      data_state: Where the data iterator stands, as JSON can hold it: tuples
        come back as lists.
      metadata: Likewise, what else a reader needs.

    Raises:
      CheckpointError: If this save, or the one before it, failed.
      ValueError: If the arguments hold what cannot be saved.
    """
    self.wait()
    step = operator.index(step)
    if step < 0:
      raise ValueError(f'checkpoint {step=} must not be negative; count up.')
    if step == self._last_step:
      return
    leaves = tree_names.saveable(state)
    files = {
      step_folders.DATA_STATE: strict_json.to_json(data_state),
      step_folders.METADATA: strict_json.to_json(metadata),
    }

    def prepare() -> None:
      folder = step_folders.begin(self._directory, step)
      for name, text in files.items():
        (folder / name).write_text(text, encoding='utf-8')

    try:
      processes.on_first(prepare, refusal=CheckpointError)
      self._arrays.start(step_folders.partial(self._directory, step), leaves)
    except CheckpointError:
      raise
    except step_folders.FAILURES as error:
      raise self._failed(step, error) from error
    self._pending = self._thread.submit(
      self._finish, step, tree_names.describe(leaves)
    )
    self._last_step = step
    if not self._config.asynchronous:
      self.wait()

  def restore(
    self, abstract_state: Any, *, step: int | None = None
  ) -> Restored | None:
    """Restores the newest whole checkpoint, wherever it was saved.

    Newer ones that are damaged are named in the log and set aside.

    Args:
      abstract_state: Tree of `jax.ShapeDtypeStruct`. A leaf with a sharding,
        of whatever mesh, comes back as such a jax array, else as numpy.
      step: Restore this one or fail.

    Returns:
      The checkpoint, or None if the directory holds none.

    Raises:
      CheckpointError: If all checkpoints, or the one wanted, are damaged.
      ValueError: If the saved tree is not the wanted one; naming a leaf.
    """
    self.wait()

    def choose() -> list[int] | None:
      chosen, findings = step_folders.choose(self._directory, step=step)
      damaged = sorted({finding.step for finding in findings})
      return None if chosen is None else [chosen, *damaged]

    found = processes.on_first(choose, refusal=CheckpointError)
    if found is None:
      return None
    chosen, *damaged = found
    folder = self._directory / str(chosen)
    wanted = tree_names.named(abstract_state)
    leaves = array_store.load(
      folder, wanted, saved=manifest.read(folder).leaves
    )

    def set_aside() -> None:
      for other in damaged:
        step_folders.set_aside(
          self._directory / str(other),
          step=other,
          max_to_keep=self._config.max_to_keep,
        )

    # Only now: had this been another model's directory, it stays as it was.
    processes.on_first(set_aside, refusal=CheckpointError)
    self._last_step = chosen
    return Restored(
      step=chosen,
      state=tree_names.unflatten_as(abstract_state, leaves),
      data_state=json.loads((folder / step_folders.DATA_STATE).read_bytes()),
      metadata=json.loads((folder / step_folders.METADATA).read_bytes()),
    )

  def steps(self) -> list[int]:
    """Steps that were saved completely, oldest first; not verified."""
    return step_folders.steps(self._directory)

  def latest_step(self) -> int | None:
    """The newest of `steps`, or None."""
    return max(self.steps(), default=None)

  def wait(self) -> None:
    """Blocks until the last save is on the disk.

    Raises:
      CheckpointError: If it failed; earlier checkpoints are as they were.
    """
    if self._pending is None:
      return
    failure = self._collect()

    def report() -> None:
      if failure:
        raise failure

    # Only process 0 writes the manifest, so the others ask how that went.
    processes.on_first(report, refusal=CheckpointError)
    report()

  def close(self) -> None:
    """Waits for this process's part of the last save; raises as `wait`.

    It asks nothing of other processes: one that fails alone must not hang.
    """
    failure = self._collect()
    self._thread.shutdown()
    self._arrays.close()
    if failure:
      raise failure

  def _collect(self) -> CheckpointError | None:
    pending, self._pending = self._pending, None
    try:
      if pending:
        pending.result()
    except step_folders.FAILURES as error:
      failure = self._failed(self._last_step, error)
      failure.__cause__ = error
      return failure
    return None

  def _finish(self, step: int, leaves: tuple[manifest.Leaf, ...]) -> None:
    """Runs in the background: nothing counts until the manifest is there."""
    self._arrays.wait()
    if jax.process_index() != 0:
      return
    folder = step_folders.partial(self._directory, step)
    manifest.write(folder, step=step, leaves=leaves)
    step_folders.publish(self._directory, step)
    step_folders.prune(
      self._directory,
      max_to_keep=self._config.max_to_keep,
      keep_every_steps=self._config.keep_every_steps,
    )

  def _failed(self, step: int | None, error: Exception) -> CheckpointError:
    """Frees the space a failed save took and says what happened."""
    if jax.process_index() == 0 and step is not None:
      shutil.rmtree(
        step_folders.partial(self._directory, step), ignore_errors=True
      )
    self._last_step = None
    return CheckpointError(
      f'checkpoint {step=} could not be saved in {self._directory}: '
      f'{step_folders.one_line(error)}; earlier ones are intact; free space '
      'there or use another --workdir.'
    )
