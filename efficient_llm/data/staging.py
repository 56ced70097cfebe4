"""Folders that appear whole or not at all."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def staged(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary folder that becomes `folder`, whole or not at all.

  Args:
    folder: The place the contents end up in. Where another process puts its
      own there meanwhile, that one stays.

  Yields:
    An empty folder on the same disk.

  Raises:
    ValueError: If the disk is full or may not be written to.
  """
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      prefix='building-', dir=folder.parent
    ) as temporary:
      contents = pathlib.Path(temporary, 'contents')
      contents.mkdir()
      yield contents
      try:
        contents.rename(folder)
      except OSError:
        # Another process was first, and its contents are the same.
        if not folder.is_dir():
          raise
  except OSError as error:
    raise ValueError(
      f'the data cache must be writable and fit on the disk: writing '
      f'{str(folder.parent)!r} failed ({error.strerror}); free some space or '
      'set data.cache_dir.'
    ) from error
