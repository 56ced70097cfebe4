"""The folders of a checkpoint directory: one per step, named by it.

A step is made as `12.partial`, renamed to `12` once its manifest is on the
disk, and renamed to `12.deleting` before it goes, so a kill at any moment
leaves a plain number only on a whole step.
"""

import logging
import pathlib
import re
import shutil

from efficient_llm.training import manifest

# What a step's folder holds beside its manifest.
ARRAYS = 'state'
DATA_STATE = 'data_state.json'
METADATA = 'metadata.json'
# What storage, the array library and their threads raise.
FAILURES = (OSError, RuntimeError, ValueError)

_STEP = re.compile(r'0|[1-9]\d*')
_DAMAGED = re.compile(r'damaged-(\d+)-(\d+)')
_PARTIAL = '.partial'
_DELETING = '.deleting'

_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
  """A checkpoint that cannot be saved or restored, said in one line."""


def one_line(error: Exception) -> str:
  """What an error says, short enough to be part of another."""
  return ' '.join(str(error).split())[:300] or type(error).__name__


def steps(directory: pathlib.Path) -> list[int]:
  """Steps that were saved completely, oldest first; not verified."""
  if not directory.is_dir():
    return []
  names = (path.name for path in directory.iterdir())
  return sorted(int(name) for name in names if _STEP.fullmatch(name))


def choose(
  directory: pathlib.Path, *, step: int | None
) -> tuple[int | None, list[manifest.Finding]]:
  """Finds the newest whole step, or checks the one asked for.

  Returns:
    The step, None if there is no step at all, and what is wrong with the
    newer ones that were passed over.

  Raises:
    CheckpointError: If no step is whole, or the one asked for is not.
  """
  candidates = steps(directory)
  if step is not None:
    if step not in candidates:
      raise CheckpointError(
        f'checkpoint {step=} is not in {directory}; choose from {candidates}.'
      )
    candidates = [step]
  findings: list[manifest.Finding] = []
  for candidate in reversed(candidates):
    wrong = manifest.verify(directory / str(candidate), step=candidate)
    if not wrong:
      return candidate, findings
    for finding in wrong:
      _log.error('DAMAGED CHECKPOINT in %s: %s', directory, finding)
    findings += wrong
  if findings:
    raise CheckpointError(
      f'no checkpoint of {candidates} in {directory} is whole ({findings[0]}); '
      'put back a copy of one or use another --workdir.'
    )
  return None, findings


def begin(directory: pathlib.Path, step: int) -> pathlib.Path:
  """Makes the folder a step is written to.

  Raises:
    CheckpointError: If it would not become the newest.
  """
  latest = max(steps(directory), default=None)
  if latest is not None and step <= latest:
    raise CheckpointError(
      f'checkpoint {step=} must be newer than {latest} in {directory}; '
      'restore that one first or use another --workdir.'
    )
  folder = partial(directory, step)
  folder.mkdir()
  return folder


def partial(directory: pathlib.Path, step: int) -> pathlib.Path:
  """Where a step is while it is being written."""
  return directory / f'{step}{_PARTIAL}'


def publish(directory: pathlib.Path, step: int) -> None:
  """Gives a step that has its manifest its name."""
  partial(directory, step).replace(directory / str(step))
  manifest.flush(directory)


def prune(
  directory: pathlib.Path, *, max_to_keep: int, keep_every_steps: int | None
) -> None:
  """Deletes all but the newest steps and those kept for ever."""
  for step in steps(directory)[:-max_to_keep]:
    if keep_every_steps is None or step % keep_every_steps:
      doomed = directory / f'{step}{_DELETING}'
      try:
        (directory / str(step)).replace(doomed)
        shutil.rmtree(doomed)
      except OSError as error:
        # The new step is safe; an old one too many must not end the run.
        _log.warning('Could not delete checkpoint %s: %s', step, error)


def tidy(directory: pathlib.Path, *, max_to_keep: int) -> None:
  """Ends what a killed run left half-done; only for the folder's one writer."""
  for path in sorted(directory.iterdir()):
    if path.name.endswith(_DELETING):
      shutil.rmtree(path)
    elif path.name.endswith(_PARTIAL):
      step = path.name.removesuffix(_PARTIAL)
      _log.error(
        'HALF-WRITTEN CHECKPOINT: %s has no %s and is not used; step %s was '
        'being saved when its run ended.',
        path,
        manifest.FILE_NAME,
        step,
      )
      set_aside(path, step=int(step), max_to_keep=max_to_keep)


def set_aside(folder: pathlib.Path, *, step: int, max_to_keep: int) -> None:
  """Renames a folder to `damaged-STEP-N`; the newest few of these stay."""
  directory = folder.parent
  number = 0
  while (target := directory / f'damaged-{step}-{number}').exists():
    number += 1
  folder.replace(target)
  _log.error('Set aside as %s.', target)
  # A job that is often killed while it saves must not fill its disk.
  aside = sorted(
    (tuple(map(int, match.groups())), path)
    for path in directory.iterdir()
    if (match := _DAMAGED.fullmatch(path.name)) and path != target
  )
  for _, path in aside[: len(aside) + 1 - max_to_keep]:
    _log.warning('Deleting %s, set aside longer ago.', path)
    shutil.rmtree(path)
