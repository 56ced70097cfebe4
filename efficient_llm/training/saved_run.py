"""What other experiments take from a run's checkpoints.

Only what was verified is returned, and nothing in the run's directory is
changed, so the run may be going on. Damaged checkpoints are named in the log
and passed over. With several processes all of them make the same calls.
"""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm.training import (
  array_store,
  manifest,
  processes,
  step_folders,
  tree_names,
)


def restore_params(
  directory: str | pathlib.Path,
  abstract_params: Any | None,
  *,
  step: int | None = None,
) -> Any:
  """Restores only `state.params` of a run's newest whole checkpoint.

  Changes nothing in the directory, so the run may be going on.

  Args:
    directory: Where a `Checkpointer` saved.
    abstract_params: As for `Checkpointer.restore`; None for all parameters, as
      nested dicts of numpy arrays.
    step: Take this one or fail.

  Raises:
    CheckpointError: If there is no whole checkpoint.
    ValueError: If the saved parameters are not the wanted ones.
  """
  if abstract_params is not None:
    tree = {'params': abstract_params}
    return restore(directory, tree, step=step)['params']
  folder = _whole(directory, step)
  saved = _saved(folder, {'params'})
  wanted = {
    leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
    for leaf in saved
  }
  leaves = array_store.load(folder, wanted, saved=saved)
  return tree_names.nest(leaves)['params']


def open_params(
  directory: str | pathlib.Path, *, step: int | None = None
) -> Callable[[str], Callable[[int | None], np.ndarray]]:
  """Opens the parameters of a run's newest whole checkpoint one by one.

  Args:
    directory: Where a `Checkpointer` saved.
    step: Take this one or fail.
  Returns:
    A function of a parameter's path, such as 'layers/mlp/up/kernel', that
    gives `array_store.open_leaf`.

  Raises:
    CheckpointError: If there is no whole checkpoint.
  """
  folder = _whole(directory, step)
  saved = {leaf.path: leaf for leaf in _saved(folder, {'params'})}
  return lambda path: array_store.open_leaf(folder, saved[f'params/{path}'])


def restore(
  directory: str | pathlib.Path, abstract: Any, *, step: int | None = None
) -> Any:
  """Restores parts of the state of a run's newest whole checkpoint.

  Args:
    directory: Where a `Checkpointer` saved.
    abstract: Shapes, dtypes and shardings of whole parts of the state, each
      under its name, such as 'params' and 'opt_state'.
    step: Take this one or fail.

  Raises:
    CheckpointError: If there is no whole checkpoint.
    ValueError: If what is saved is not what is wanted.
  """
  folder = _whole(directory, step)
  wanted = tree_names.named(abstract)
  saved = _saved(folder, {name.split('/')[0] for name in wanted})
  leaves = array_store.load(folder, wanted, saved=saved)
  return tree_names.unflatten_as(abstract, leaves)


def _saved(folder: pathlib.Path, parts: set[str]) -> list[manifest.Leaf]:
  """What a checkpoint holds of some parts of the state."""
  saved = [
    leaf
    for leaf in manifest.read(folder).leaves
    if leaf.path.split('/')[0] in parts
  ]
  if not saved:
    raise ValueError(
      f'checkpoint {folder} must hold {" and ".join(sorted(parts))}; choose '
      'another.'
    )
  return saved


def read_metadata(
  directory: str | pathlib.Path, *, step: int | None = None
) -> dict[str, Any]:
  """Reads the metadata of a run's newest whole checkpoint, changing nothing.

  Raises:
    CheckpointError: If there is no whole checkpoint.
  """
  return json.loads(
    (_whole(directory, step) / step_folders.METADATA).read_bytes()
  )


def verify(directory: str | pathlib.Path) -> list[manifest.Finding]:
  """Checks every checkpoint of a directory; empty when all are whole."""
  path = pathlib.Path(directory)
  return [
    finding
    for step in step_folders.steps(path)
    for finding in manifest.verify(path / str(step), step=step)
  ]


def clone(
  source: str | pathlib.Path,
  directory: str | pathlib.Path,
  *,
  step: int | None = None,
) -> int:
  """Copies the newest whole checkpoint, so another run starts from it.

  Returns:
    The step of the copy.

  Raises:
    CheckpointError: If there is none, or the copy exists or differs.
  """
  folder = _whole(source, step)
  original = manifest.read(folder)
  target = pathlib.Path(directory).absolute()

  def copy() -> None:
    target.mkdir(parents=True, exist_ok=True)
    partial = step_folders.begin(target, original.step)
    shutil.copytree(folder, partial, dirs_exist_ok=True)
    (partial / manifest.FILE_NAME).unlink()
    copied = manifest.write(partial, step=original.step, leaves=original.leaves)
    if copied != original:
      raise step_folders.CheckpointError(
        f'{partial} must equal {folder}; copy it again.'
      )
    step_folders.publish(target, original.step)

  try:
    processes.on_first(copy, refusal=step_folders.CheckpointError)
  except OSError as error:
    raise step_folders.CheckpointError(
      f'checkpoint {folder} could not be copied: '
      f'{step_folders.one_line(error)}; free space or choose another directory.'
    ) from error
  return original.step


def _whole(directory: str | pathlib.Path, step: int | None) -> pathlib.Path:
  """The folder of the newest whole step; process 0 looks for all."""
  path = pathlib.Path(directory).absolute()
  chosen = processes.on_first(
    lambda: step_folders.choose(path, step=step)[0],
    refusal=step_folders.CheckpointError,
  )
  if chosen is None:
    raise step_folders.CheckpointError(
      f'no checkpoint in {path}; choose another directory.'
    )
  return path / str(chosen)
