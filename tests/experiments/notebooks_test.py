"""Holds the notebooks of experiments/colabs, each a script and its pair."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

import efficient_llm

_FOLDER = pathlib.Path(__file__).parents[2] / 'experiments' / 'colabs'
_NAMES = sorted(path.stem for path in _FOLDER.glob('*.py'))
_MOST_DIALS = 6
_PATIENCE_SECS = 1800


def _cells(name: str) -> list[tuple[str, str]]:
  """Kind and text of a script's cells, as in a notebook."""
  _, *parts = re.split(
    r'^# %%(.*)\n', (_FOLDER / f'{name}.py').read_text(), flags=re.M
  )
  cells = []
  for mark, text in zip(parts[::2], parts[1::2], strict=True):
    if 'markdown' in mark:
      cells.append(('markdown', re.sub(r'^# ?', '', text.strip(), flags=re.M)))
    else:
      code = re.sub(r'^(\s*)# %', r'\1%', text.strip(), flags=re.M)
      cells.append(('code', code))
  return cells


def _notebook(name: str) -> dict[str, Any]:
  return json.loads((_FOLDER / f'{name}.ipynb').read_text())


def test_there_is_a_notebook_for_each_technique_and_the_line() -> None:
  assert {'scaling', 'ligo', 'diloco', 'tlt', 'end_to_end'} <= set(_NAMES)
  assert sorted(path.stem for path in _FOLDER.glob('*.ipynb')) == _NAMES


@pytest.mark.parametrize('name', _NAMES)
def test_a_notebook_and_its_script_agree(name: str) -> None:
  cells = [
    (cell['cell_type'], ''.join(cell['source']))
    for cell in _notebook(name)['cells']
  ]
  assert cells == _cells(name), (
    f'Write it again: jupytext --to ipynb experiments/colabs/{name}.py'
  )


@pytest.mark.parametrize('name', _NAMES)
def test_a_notebook_holds_no_outputs(name: str) -> None:
  code = [x for x in _notebook(name)['cells'] if x['cell_type'] == 'code']
  assert code
  assert not any(x['outputs'] or x['execution_count'] for x in code)


@pytest.mark.parametrize('name', _NAMES)
def test_a_notebook_has_what_a_reader_needs(name: str) -> None:
  text = (_FOLDER / f'{name}.py').read_text()
  assert 1 <= len(re.findall(r'# @param', text)) <= _MOST_DIALS
  badge = 'github/efficient_llm/efficient_llm/blob/main/experiments/colabs/'
  assert f'{badge}{name}.ipynb' in text
  (pin,) = re.findall(r'%pip install .*@(\S+)', text)
  assert pin == f'v{efficient_llm.__version__}'
  # It says what is to be seen, and checks it in the last cell.
  assert '**What you should see:**' in text
  assert '\nassert ' in _cells(name)[-1][1]


@pytest.mark.parametrize(
  'name',
  [
    # The line has a smaller test of its own.
    pytest.param(name, marks=pytest.mark.slow if name == 'end_to_end' else ())
    for name in _NAMES
  ],
)
def test_the_cells_run_to_the_end_on_the_cpu(
  name: str, tmp_path: pathlib.Path
) -> None:
  done = subprocess.run(
    [sys.executable, _FOLDER / f'{name}.py'],
    cwd=tmp_path,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'MPLBACKEND': 'agg',
      'PYTHONPATH': str(_FOLDER.parents[1]),
      'TMPDIR': str(tmp_path),
    },
    timeout=_PATIENCE_SECS,
    capture_output=True,
    text=True,
    check=False,
  )
  # The last cell checks what the reader was told to see.
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('nbclient') is None,
  reason='needs the extra [notebook]',
)
@pytest.mark.parametrize('name', _NAMES)
def test_a_notebook_runs_to_its_end_on_the_cpu(
  name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
  # Here only, as they belong to the extra.
  client = importlib.import_module('nbclient')
  nbformat = importlib.import_module('nbformat')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('PYTHONPATH', str(_FOLDER.parents[1]))
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  notebook = nbformat.read(_FOLDER / f'{name}.ipynb', as_version=4)
  client.NotebookClient(
    notebook, timeout=_PATIENCE_SECS, resources={'metadata': {'path': tmp_path}}
  ).execute()
