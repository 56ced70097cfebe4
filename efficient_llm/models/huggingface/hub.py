"""Names of checkpoints: 'hf:' and a folder, or a repository of the hub."""

import importlib
import pathlib
import re

PREFIX = 'hf:'

_REPOSITORY = re.compile(r'[\w.-]+/[\w.-]+')
# No pickle and no code is even fetched.
_FETCHED = ('*.safetensors', '*.json', '*.txt', '*.model', '*.jinja')


def is_reference(name: object) -> bool:
  """Whether a name begins with 'hf:'."""
  return str(name).startswith(PREFIX)


def absolute(name: str) -> str:
  """The same checkpoint or folder, named from anywhere."""
  return name if is_reference(name) else str(pathlib.Path(name).absolute())


def folder(reference: str) -> pathlib.Path:
  """The folder that a name stands for; a repository is fetched into one.

  Args:
    reference: 'hf:DIR' or 'hf:OWNER/NAME'.
  Raises:
    ValueError: If there is no such folder, and no such repository to be had.
  """
  name = reference.removeprefix(PREFIX)
  path = pathlib.Path(name).absolute()
  if name and path.is_dir():
    return path
  if not _REPOSITORY.fullmatch(name):
    raise ValueError(
      f'{reference} must be hf: and a folder or OWNER/NAME; choose another.'
    )
  try:
    library = importlib.import_module('huggingface_hub')
  except ImportError as error:
    raise ValueError(
      f'{reference} is no folder, and fetching it needs huggingface_hub; '
      "install the extra 'hf' or name a folder."
    ) from error
  try:
    return pathlib.Path(
      library.snapshot_download(name, allow_patterns=list(_FETCHED))
    )
  # Whatever the network and the library raise: it is not to be had.
  except Exception as error:
    reason = ' '.join(str(error).split())[:200]
    raise ValueError(
      f'{reference} is no folder and could not be fetched: {reason}; name a '
      'folder.'
    ) from error
