"""What libraries may say while a binary runs: warnings, each once."""

import logging as std_logging
import pathlib
import sys
import threading
import warnings
from typing import Any

from absl import logging

from experiments import exits


def quiet() -> None:
  """Shows our own log lines, and of libraries only warnings."""
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.addFilter(_is_shown)
  handler.setFormatter(
    std_logging.Formatter('%(asctime)s %(message)s', datefmt='%H:%M:%S')
  )
  sys.unraisablehook = _print_unraisable
  # Where one array cannot be saved, Orbax drops the writes of the others.
  warnings.filterwarnings(
    'ignore', "coroutine 'async_serialize", category=RuntimeWarning
  )


def _is_shown(record: std_logging.LogRecord) -> bool:
  if exits.is_in_project(record.pathname):
    return True
  # Orbax logs a failed save at length, and then raises it; what failed beside
  # it is told by asyncio, at a time of the garbage collector's choice.
  is_told_again = (
    'orbax' in pathlib.PurePath(record.pathname).parts
    or 'was never retrieved' in record.getMessage()
  )
  return record.levelno >= std_logging.WARNING and not is_told_again


def _print_unraisable(unraisable: Any) -> None:
  # Callbacks of a C++ library that has failed end here, once for each file;
  # the failure itself is raised in the thread that waits for it.
  if threading.current_thread() is threading.main_thread():
    sys.__unraisablehook__(unraisable)
