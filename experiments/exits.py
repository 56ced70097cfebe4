"""How a binary ends: an exit code, and where something is wrong one line.

0 done, 1 failure, 2 bad input (the line says what to change), 3 stopped by a
signal: the same command continues.
"""

import errno
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from efficient_llm.training import loop, processes

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 3

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_STORAGE_ERRORS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EFBIG,
  errno.ENOTDIR,
  errno.EISDIR,
)


def guarded(task: Callable[[], int]) -> int:
  """Runs a task and turns what went wrong into one line and an exit code.

  SIGTERM ends it as Ctrl-C does, unless the training loop answers it.

  Args:
    task: Returns the exit code where nothing goes wrong.
  """
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    return task()
  except (loop.NonFiniteError, processes.ProcessError) as error:
    print(f'error: {error}', file=sys.stderr)
    return FAILED
  except ValueError as error:
    if not _is_ours(error):
      raise
    refuse(error)
  except OSError as error:
    if error.errno not in _STORAGE_ERRORS:
      raise
    refuse(
      f'{error.filename or "the working directory"} cannot be written: '
      f'{error.strerror}; free space there or choose another --workdir.'
    )
  except KeyboardInterrupt:
    print(
      'Interrupted; the same command continues from the last checkpoint.',
      file=sys.stderr,
    )
    return STOPPED


def refuse(error: Exception | str) -> NoReturn:
  """Says in one line what is wrong with the input and exits."""
  line = ' '.join(str(error).split())
  print(f'error: {line}', file=sys.stderr)
  sys.exit(BAD_INPUT)


def is_in_project(file: str) -> bool:
  """Whether a source file is the project's, not a library's."""
  path = pathlib.Path(file)
  return path.is_relative_to(_ROOT) and 'site-packages' not in path.parts


def _is_ours(error: ValueError) -> bool:
  """Whether this project raised it: then it is about input, else a defect."""
  last = traceback.extract_tb(error.__traceback__)[-1]
  return is_in_project(last.filename)
