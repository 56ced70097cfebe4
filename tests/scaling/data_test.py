import gzip
import json
import math
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from efficient_llm.scaling import data, planner

_CSV = """n_params,tokens,loss,model
1e6,1e9,4.0,a
1e6,2e9,3.5,a
1e7,1e9,3.0,b
"""


def _write(folder: pathlib.Path, text: str) -> pathlib.Path:
  path = folder / 'runs.csv'
  path.write_text(text)
  return path


def test_all_formats_hold_the_same_rows(tmp_path: pathlib.Path) -> None:
  rows = [
    {'N': 1e6, 'D': 1e9, 'loss': 4.0, 'run': 'a'},
    {'N': 1e6, 'D': 2e9, 'loss': 3.5, 'run': 'a'},
    {'N': 1e7, 'D': 1e9, 'loss': 3.0, 'run': 'b'},
  ]
  packed = tmp_path / 'runs.csv.gz'
  packed.write_bytes(gzip.compress(_CSV.encode()))
  lines = tmp_path / 'runs.jsonl'
  lines.write_text('\n'.join(map(json.dumps, rows)))
  table = tmp_path / 'runs.parquet'
  parquet.write_table(pa.Table.from_pylist(rows), table)
  for path in (_write(tmp_path, _CSV), packed, lines, table):
    runs = data.read(path)
    np.testing.assert_array_equal(runs.num_params, [1e6, 1e6, 1e7])
    np.testing.assert_array_equal(runs.num_tokens, [1e9, 2e9, 1e9])
    np.testing.assert_array_equal(runs.loss, [4.0, 3.5, 3.0])
    np.testing.assert_array_equal(runs.is_final, [False, True, True])
    np.testing.assert_allclose(runs.flops, [6e15, 12e15, 6e16])


@pytest.mark.parametrize(
  ('unit', 'written', 'nats'),
  [('bits', 2.0, 2 * math.log(2)), ('perplexity', math.e**2, 2.0)],
)
def test_losses_become_nats(
  unit, written: float, nats: float, tmp_path: pathlib.Path
) -> None:
  path = _write(tmp_path, f'N,D,loss\n1e6,1e9,{written}\n')
  runs = data.read(path, data.DataConfig(unit=unit))
  # Of one logarithm or product in float64.
  np.testing.assert_allclose(runs.loss, [nats], rtol=1e-15)


_BAD = """n_params,tokens,loss,model,loss_unit
1e6,1e9,4.0,a,nats
1e6,2e9,nan,a,nats
1e6,3e9,-1,a,nats
1e6,1e9,3.9,a,nats
1e6,0.5e9,3.9,a,nats
1e6,4e9,3.9,a,bits
1e6,5e9,39.0,a,nats
,6e9,3.9,a,nats
1e6,7e9,3.0,a,nats
"""


def test_bad_rows_are_named_with_their_lines(tmp_path: pathlib.Path) -> None:
  path = _write(tmp_path, _BAD)
  with pytest.raises(ValueError, match='has 7 bad rows: line 3: loss is not a'):
    data.read(path)
  runs = data.read(path, data.DataConfig(bad_rows='drop'))
  np.testing.assert_array_equal(runs.loss, [4.0, 3.0])
  assert [(bad.line, bad.reason.split()[0]) for bad in runs.bad_rows] == [
    (3, 'loss'),
    (4, 'loss=-1'),
    (5, 'duplicate:'),
    (6, 'tokens'),
    (7, 'unit'),
    (8, 'loss=39'),
    (9, 'num_params'),
  ]


def test_a_missing_column_names_those_found(tmp_path: pathlib.Path) -> None:
  path = _write(tmp_path, 'size,D,loss\n1,2,3\n')
  with pytest.raises(ValueError, match="no column 'num_params' but size, D"):
    data.read(path)
  named = data.DataConfig(columns=data.ColumnConfig(num_params='size'))
  assert len(data.read(path, named)) == 1


def test_sizes_that_share_a_name_are_different_runs(
  tmp_path: pathlib.Path,
) -> None:
  path = _write(
    tmp_path,
    'N,D,loss,model\n1e6,1e9,4,llama\n1e6,2e9,3.9,llama\n1e7,1e9,3.5,llama\n',
  )
  runs = data.read(path)
  assert not runs.bad_rows
  np.testing.assert_array_equal(runs.is_final, [False, True, True])


@pytest.mark.parametrize('column', ['', ',model'])
def test_seeds_are_repeated_measurements(
  column: str, tmp_path: pathlib.Path
) -> None:
  rng = np.random.default_rng(0)
  lines = [f'N,D,loss,seed{column}']
  name = ',small' if column else ''
  for seed in range(200):
    # The first loss is the same in all: no row is a duplicate for that.
    lines.append(f'1e6,1e9,4.0,{seed}{name}')
    lines.append(f'1e6,2e9,{3.5 * np.exp(rng.normal(0, 0.01))},{seed}{name}')
  runs = data.read(_write(tmp_path, '\n'.join(lines) + '\n'))
  assert len(runs) == 400
  assert runs.is_final.sum() == 200
  # Four standard errors of a deviation of 200 draws.
  assert planner.noise_of(runs) == pytest.approx(0.01, rel=4 / 400**0.5)
