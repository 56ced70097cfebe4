"""The published families that results are checked on, where they are at hand.

They are no part of the project: a folder of CSV files in one schema, with the
columns that `data` knows, several families in a file.
"""

import pathlib

from efficient_llm.scaling import data

# Beside the checkout, or where the caller says.
DEFAULT_FOLDER = (
  pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'scaling'
)


def is_here(folder: pathlib.Path = DEFAULT_FOLDER) -> bool:
  """Whether there are families to read.

  Args:
    folder: Of the CSV files.
  """
  return any(folder.glob('*.csv.gz'))


def families(folder: pathlib.Path = DEFAULT_FOLDER) -> dict[str, data.Runs]:
  """Reads every family; bad and repeated rows are left out.

  Args:
    folder: Of the CSV files.
  Raises:
    ValueError: If there are none.
  """
  paths = sorted(folder.glob('*.csv.gz'))
  if not paths:
    raise ValueError(f'{folder} holds no *.csv.gz; name the data with --data.')
  found: dict[str, data.Runs] = {}
  for path in paths:
    runs = data.read(path, data.DataConfig(bad_rows='drop'))
    found |= runs.by_family()
  return found


def group_of(family: str) -> str:
  """What a family shares its models with; such families are one draw.

  Args:
    family: Name of a published family.
  """
  groups = {
    'gpt2_': 'datablations',
    'mpl_': 'multipowerlaw',
    'routing_': 'routing',
    'overtrain_': 'overtrain',
  }
  for start, group in groups.items():
    if family.startswith(start):
      return group
  return family.split('_')[0]
