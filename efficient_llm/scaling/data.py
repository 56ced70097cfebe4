"""Reads what models cost and what they reached, from files of any origin.

Rows are evaluations of training runs: model size, tokens seen, loss. Bad ones
are found here, once, each with its line, so that no fit meets them.

Over 300 lines: the formats, and what all of them are checked for.
"""

import collections
import csv
import dataclasses
import gzip
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pyarrow import parquet

from efficient_llm import typing as types

# Nobody's loss: worse than guessing among as many words as there are people.
_MOST_NATS = 23.0
_MAX_SHOWN = 10
_NAMES = {
  'num_params': ('num_params', 'n_params', 'params', 'parameters', 'N'),
  'num_tokens': ('num_tokens', 'tokens', 'tokens_seen', 'D'),
  'loss': ('loss', 'val_loss', 'eval_loss', 'perplexity', 'ppl'),
  'run': ('run', 'model', 'model_name', 'run_id', 'name'),
  'family': ('family', 'recipe', 'scaled_set'),
  'flops': ('flops', 'compute', 'C'),
  'unique_tokens': ('unique_tokens', 'tokens_unique'),
  'unit': ('loss_unit', 'unit'),
  'is_final': ('is_final', 'final'),
  'learning_rate': ('learning_rate', 'lr'),
  'seed': ('seed', 'random_seed'),
}
_NEEDED = ('num_params', 'num_tokens', 'loss')
_NUMBERS = (*_NEEDED, 'flops', 'unique_tokens', 'learning_rate')


@dataclasses.dataclass(frozen=True)
class ColumnConfig:
  """What the columns of a file are called; None looks for usual names.

  Attributes:
    num_params: Parameters of the model.
    num_tokens: Tokens seen so far.
    loss: In the unit that `DataConfig.unit` names.
    run: Rows with the same value are checkpoints of one run.
    family: Models that differ in nothing but size and tokens.
    flops: Of training; 6 N D where there is no such column.
    unique_tokens: Different tokens that there were.
    unit: What the loss is measured in, by row.
    is_final: Whether the row is the end of a run.
    learning_rate: At that row.
    seed: Rows that differ in nothing else are repeated measurements, and tell
      how noisy runs are.
  """

  num_params: str | None = None
  num_tokens: str | None = None
  loss: str | None = None
  run: str | None = None
  family: str | None = None
  flops: str | None = None
  unique_tokens: str | None = None
  unit: str | None = None
  is_final: str | None = None
  learning_rate: str | None = None
  seed: str | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """How rows are read.

  Attributes:
    columns: Their names.
    unit: What the loss is measured in: nats, bits or perplexity per token.
    bad_rows: Whether bad rows end it or are left out.
    family: Only rows of this family; None for all.
  """

  columns: ColumnConfig = dataclasses.field(default_factory=ColumnConfig)
  unit: Literal['nats', 'bits', 'perplexity'] = 'nats'
  bad_rows: Literal['refuse', 'drop'] = 'refuse'
  family: str | None = None

  def validate(self) -> None:
    types.check_choices(self, name='rows')


@dataclasses.dataclass(frozen=True)
class BadRow:
  """A row, or a run, that no law should see."""

  # Of this project's own runs, the file.
  line: int | str
  reason: str


@dataclasses.dataclass(frozen=True)
class Runs:
  """Evaluations of training runs, one entry each.

  Attributes:
    num_params: Model sizes, float64.
    num_tokens: Tokens seen.
    loss: In nats.
    run: What run each is of, as text.
    family: What family, as text.
    flops: Of training until then.
    unique_tokens: NaN where it is not known.
    learning_rate: NaN where it is not known.
    is_final: Whether it is the last of its run.
    bad_rows: What was left out.
  """

  num_params: np.ndarray
  num_tokens: np.ndarray
  loss: np.ndarray
  run: np.ndarray
  family: np.ndarray
  flops: np.ndarray
  unique_tokens: np.ndarray
  learning_rate: np.ndarray
  is_final: np.ndarray
  bad_rows: tuple[BadRow, ...] = ()

  def __len__(self) -> int:
    return len(self.loss)

  @property
  def sizes(self) -> np.ndarray:
    """Different model sizes, ascending."""
    return np.unique(self.num_params)

  def where(self, mask: np.ndarray) -> 'Runs':
    """Those rows alone.

    Args:
      mask: Which, as truths or as indices.
    """
    parts = {
      field.name: getattr(self, field.name)[mask]
      for field in dataclasses.fields(self)
      if field.name != 'bad_rows'
    }
    return Runs(**parts, bad_rows=self.bad_rows)

  def by_family(self) -> dict[str, 'Runs']:
    """Rows of each family, in the order in which families come."""
    names = dict.fromkeys(self.family.tolist())
    return {name: self.where(self.family == name) for name in names}


def make(
  num_params: Any,
  num_tokens: Any,
  loss: Any,
  *,
  run: Any = None,
  family: Any = 'family',
  **others: Any,
) -> Runs:
  """Runs from arrays; what is not given is unknown.

  Args:
    num_params: Model sizes.
    num_tokens: Tokens seen.
    loss: In nats.
    run: Names; by default every size is one run.
    family: Names.
    **others: Further fields of `Runs`.
  """
  num_params, num_tokens, loss = (
    np.atleast_1d(np.asarray(x, np.float64))
    for x in (num_params, num_tokens, loss)
  )
  count = len(loss)
  unknown = np.full(count, np.nan)
  if run is None:
    run = np.array([f'{size:.6g}' for size in num_params], dtype=object)
  run = np.broadcast_to(np.asarray(run, object), (count,))
  filled = {
    'flops': 6 * num_params * num_tokens,
    'unique_tokens': unknown,
    'learning_rate': unknown,
    'is_final': _last_of_runs(run, num_tokens),
    **others,
  }
  return Runs(
    num_params,
    num_tokens,
    loss,
    run,
    np.broadcast_to(np.asarray(family, object), (count,)),
    **filled,
  )


def read(path: str | pathlib.Path, config: DataConfig | None = None) -> Runs:
  """Reads a file of rows: CSV or JSON lines, gzipped or not, or Parquet.

  Args:
    path: Of the file.
    config: How; by default as `DataConfig` says.
  Returns:
    The good rows, and what is wrong with the others.
  Raises:
    ValueError: If there is no such file, a column is missing, rows are bad and
      not to be dropped, or none is left.
  """
  config = config or DataConfig()
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f'data={path} is not a file; name a CSV, JSONL, Parquet.')
  try:
    rows = list(_rows(path))
  except (UnicodeDecodeError, csv.Error, json.JSONDecodeError, OSError) as e:
    raise ValueError(
      f'data={path} cannot be read: {" ".join(str(e).split())}; mend the file.'
    ) from e
  if not rows:
    raise ValueError(f'data={path} holds no rows; choose another file.')
  names = _columns(config.columns, list(rows[0][1]), path)
  if config.family is not None:
    column = names.get('family', '')
    families = sorted({str(row.get(column)) for _, row in rows})
    rows = [x for x in rows if str(x[1].get(column)) == config.family]
    if not rows:
      raise ValueError(
        f'rows.family={config.family!r} must be one of {_some(families)}.'
      )
  return _checked(rows, names, config, path)


def _rows(path: pathlib.Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
  """Yields line numbers, the header being line 1, and rows by column."""
  kinds = [s for s in path.suffixes if s != '.gz']
  kind = kinds[-1].lower() if kinds else ''
  if kind in ('.parquet', '.pq'):
    table = parquet.read_table(path)
    yield from enumerate(table.to_pylist(), 1)
    return
  opener = gzip.open if path.suffix == '.gz' else open
  with opener(path, 'rt', encoding='utf-8-sig', newline='') as file:
    if kind in ('.jsonl', '.ndjson', '.json'):
      for line, text in enumerate(file, 1):
        if text.strip():
          yield line, json.loads(text)
      return
    reader = csv.DictReader(file)
    for row in reader:
      yield reader.line_num, row


def _columns(
  wanted: ColumnConfig, found: Sequence[str], path: pathlib.Path
) -> dict[str, str]:
  """Finds the column of each field; refuses where a needed one is missing."""
  names = {}
  for field in dataclasses.fields(wanted):
    asked = getattr(wanted, field.name)
    usual = [asked] if asked is not None else _NAMES[field.name]
    name = next((one for one in usual if one in found), None)
    if name is not None:
      names[field.name] = name
    elif asked is not None or field.name in _NEEDED:
      raise ValueError(
        f'{path} has no column {asked or field.name!r} but '
        f'{_some(list(found))}; set rows.columns.{field.name}.'
      )
  return names


def _checked(
  rows: list[tuple[int, Mapping[str, Any]]],
  names: Mapping[str, str],
  config: DataConfig,
  path: pathlib.Path,
) -> Runs:
  """Finds the bad rows, and makes arrays of the others."""
  unit_column = names.get('unit')
  units = collections.Counter(
    str(row.get(unit_column)) for _, row in rows if unit_column
  )
  usual_unit = units.most_common(1)[0][0] if units else None
  bad: list[BadRow] = []
  kept: list[dict[str, Any]] = []
  furthest: dict[tuple[str, str], float] = {}
  for line, row in rows:
    values = {
      name: _number(row.get(names[name])) for name in _NUMBERS if name in names
    }
    reason = _fault(values, config.unit)
    unit = str(row.get(unit_column)) if unit_column else None
    if reason is None and unit != usual_unit:
      reason = f'unit {unit!r} where most rows have {usual_unit!r}'
    family = str(row.get(names.get('family', ''), 'family'))
    run = str(row.get(names.get('run', ''), f'{values["num_params"]:.6g}'))
    seed = row.get(names.get('seed', ''))
    if seed not in (None, ''):
      run = f'{run} seed {seed}'
    if reason is None and 'run' in names:
      # A column 'model' may name what all sizes have in common.
      key = (family, f'{run}/{values["num_params"]}')
      before = furthest.get(key, -math.inf)
      if values['num_tokens'] == before:
        reason = 'duplicate: the run has a row with as many tokens'
      elif values['num_tokens'] < before:
        reason = 'tokens do not grow within the run'
      else:
        furthest[key] = values['num_tokens']
    if reason is None and 'run' not in names:
      key = (family, f'{run}/{values["num_tokens"]}/{values["loss"]}')
      if key in furthest:
        reason = 'duplicate of an earlier row'
      furthest[key] = 0.0
    if reason is not None:
      bad.append(BadRow(line, reason))
      continue
    kept.append({**values, 'family': family, 'run': run})
  if bad and config.bad_rows == 'refuse':
    shown = '; '.join(f'line {x.line}: {x.reason}' for x in bad[:_MAX_SHOWN])
    more = (
      f'; and {len(bad) - _MAX_SHOWN} more' if len(bad) > _MAX_SHOWN else ''
    )
    raise ValueError(
      f'{path} has {len(bad)} bad rows: {shown}{more}. Mend them or set '
      'rows.bad_rows=drop.'
    )
  if not kept:
    raise ValueError(f'{path} has no good row of {len(rows)}; mend the file.')
  return _assembled(kept, bad, config.unit)


def _fault(values: Mapping[str, float], unit: str) -> str | None:
  for name in _NEEDED:
    value = values[name]
    if not math.isfinite(value):
      return f'{name} is not a finite number'
    if value <= 0:
      return f'{name}={value:g} is not above 0'
  nats = to_nats(values['loss'], unit)
  if nats > _MOST_NATS:
    return f'loss={values["loss"]:g} is no loss in {unit}; perplexity?'
  if nats <= 0:
    return f'loss={values["loss"]:g} is below 1, and no perplexity'
  return None


def to_nats(loss: Any, unit: str) -> Any:
  """Converts a loss.

  Args:
    loss: A number or an array.
    unit: 'nats', 'bits' or 'perplexity'.
  """
  if unit == 'bits':
    return loss * math.log(2)
  return np.log(loss) if unit == 'perplexity' else loss


def _assembled(
  kept: list[dict[str, Any]], bad: list[BadRow], unit: str
) -> Runs:
  count = len(kept)

  def column(name: str) -> np.ndarray:
    return np.array([row.get(name, np.nan) for row in kept], np.float64)

  num_params, num_tokens = column('num_params'), column('num_tokens')
  flops = column('flops')
  # Some published tables overflowed there.
  known = np.isfinite(flops) & (flops > 0)
  run, family = (np.empty(count, object) for _ in range(2))
  run[:] = [row['run'] for row in kept]
  family[:] = [row['family'] for row in kept]
  both = np.array(
    [f'{f}\n{r}\n{n}' for f, r, n in zip(family, run, num_params, strict=True)]
  )
  return Runs(
    num_params=num_params,
    num_tokens=num_tokens,
    loss=to_nats(column('loss'), unit),
    run=run,
    family=family,
    flops=np.where(known, flops, 6 * num_params * num_tokens),
    unique_tokens=column('unique_tokens'),
    learning_rate=column('learning_rate'),
    is_final=_last_of_runs(both, num_tokens),
    bad_rows=tuple(bad),
  )


def _last_of_runs(run: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
  last: dict[Any, int] = {}
  for i, name in enumerate(run.tolist()):
    if name not in last or num_tokens[i] > num_tokens[last[name]]:
      last[name] = i
  found = np.zeros(len(run), bool)
  found[list(last.values())] = True
  return found


def _number(value: Any) -> float:
  try:
    return float(value)
  except (TypeError, ValueError):
    return math.nan


def _some(names: Sequence[str]) -> str:
  shown = ', '.join(map(str, names[:30]))
  return shown + (f' and {len(names) - 30} more' if len(names) > 30 else '')
