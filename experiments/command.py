"""The command line of a tool that makes no run of its own."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags

from experiments import exits, library_logs, runner


def main(
  define_flags: Callable[[], None], run: Callable[[dict[str, str]], int]
) -> NoReturn:
  """Parses flags and runs a tool; does not return.

  Args:
    define_flags: Defines the tool's absl flags.
    run: Does the work and returns an exit code; it gets the --config.FIELD
      overrides as text by dotted field.
  """
  define_flags()
  changes: dict[str, str] = {}

  def parse_flags(argv: Sequence[str]) -> list[str]:
    try:
      others, found = runner.split_overrides(argv)
      changes.update(found)
      rest = flags.FLAGS(others)
    except (flags.Error, ValueError) as error:
      exits.refuse(error)
    if len(rest) > 1:
      exits.refuse(f'{rest[1]!r} is not a flag; flags begin with --.')
    return rest

  def task() -> int:
    library_logs.quiet()
    try:
      return run(changes)
    except KeyboardInterrupt:
      print('error: interrupted', file=sys.stderr)
      return exits.FAILED

  app.run(lambda _: sys.exit(exits.guarded(task)), flags_parser=parse_flags)
  raise AssertionError('app.run returned')
