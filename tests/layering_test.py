"""Holds the import order of the code base, and that every module imports."""

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_TOP = ('efficient_llm', 'experiments', 'benchmarks')
# A layer imports itself and what stands above it, never its neighbours.
_LAYERS = (
  ('typing',),
  ('sharding', 'kernels'),
  ('models',),
  ('optimizer', 'data'),
  ('training',),
  ('speculative', 'scaling', 'ligo', 'diloco'),
  ('tlt',),
  ('end_to_end',),
  ('experiments',),
  ('benchmarks',),
)
_RANK = {name: i for i, names in enumerate(_LAYERS) for name in names}
_TECHNIQUES = ('speculative', 'scaling', 'ligo', 'diloco', 'tlt')
_TECHNIQUES_BELOW = {'tlt': ('speculative',)}
# 'scaling' is also an ordinary word, so only its import is looked for.
_TECHNIQUE_WORD = re.compile(r'tlt|grpo|ligo|diloco|speculative', re.IGNORECASE)
_BINARIES_ONLY = (
  'absl.app',
  'absl.flags',
  'jax.distributed',
  'os.environ',
  'os.getenv',
  'os.putenv',
)
_MAX_LINES = 300
# Two binaries may define the same flag, as they never run together.
# Modules whose library is an extra of its own.
_NEED_AN_EXTRA = {
  'benchmarks.torch_transformer': 'torch',
  'efficient_llm.training.lm_eval_model': 'lm_eval',
  **dict.fromkeys(
    (
      'efficient_llm.diloco.wan.app.islands_app.hub',
      'efficient_llm.diloco.wan.app.islands_app.island',
      'efficient_llm.diloco.wan.flower_frames',
      'efficient_llm.diloco.wan.flower_process',
      'efficient_llm.diloco.wan.hub_app',
      'efficient_llm.diloco.wan.keys',
      'efficient_llm.diloco.wan.shim',
    ),
    'flwr',
  ),
}
_IMPORT_ALL = """
import importlib, sys
from absl import flags
for name in sys.argv[1:]:
  known = set(flags.FLAGS)
  importlib.import_module(name)
  for flag in set(flags.FLAGS) - known:
    delattr(flags.FLAGS, flag)
"""


def _modules() -> dict[str, pathlib.Path]:
  paths = (
    path
    for top in _TOP
    for path in sorted((_ROOT / top).rglob('*.py'))
    # Notebooks are run, not imported.
    if 'colabs' not in path.parts
  )
  return {
    '.'.join(path.relative_to(_ROOT).with_suffix('').parts): path
    for path in paths
  }


_MODULES = _modules()


def _layer(module: str) -> str | None:
  parts = module.split('.')
  if parts[0] != 'efficient_llm':
    return parts[0] if parts[0] in _TOP else None
  # The package itself (its version) belongs to no layer.
  return parts[1] if len(parts) > 1 and parts[1][:2] != '__' else None


def _imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
  """Yields (local name, full dotted name) of everything imported."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.asname or alias.name, alias.name
    elif isinstance(node, ast.ImportFrom):
      origin = '.' * node.level + (node.module or '')
      for alias in node.names:
        yield alias.asname or alias.name, f'{origin}.{alias.name}'


def _used_names(tree: ast.AST) -> set[str]:
  """Returns the full dotted names a module imports or reaches into."""
  imported = dict(_imported_names(tree))
  names = set(imported.values())
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      head, _, tail = ast.unparse(node).partition('.')
      names.add(f'{imported.get(head, head)}.{tail}')
  return names


def _starts_with(name: str, prefix: str) -> bool:
  return name == prefix or name.startswith(prefix + '.')


def _import_error(importer: str, name: str) -> str | None:
  """Says why `importer` may not import `name`, if so."""
  if name.startswith('.'):
    return f'{importer} imports {name}; write the full module name.'
  layer, other = _layer(importer), _layer(name)
  if other is None or layer == other:
    return None
  if layer is None:
    return f'{importer} imports {name}; a package root imports nothing of ours.'
  unknown = {layer, other} - set(_RANK)
  if unknown:
    return f'{importer} imports {name}; {unknown} is not in _LAYERS.'
  if layer in _TECHNIQUES and other in _TECHNIQUES:
    allowed = other in _TECHNIQUES_BELOW.get(layer, ())
  else:
    allowed = _RANK[other] < _RANK[layer]
  return None if allowed else f'{importer} imports {name}; it is not below.'


def violations(module: str, source: str) -> list[str]:
  """Returns what a module does against the order, one line each.

  Args:
    module: Dotted name of the module.
    source: Its text.
  """
  tree = ast.parse(source)
  found = [
    error
    for _, name in _imported_names(tree)
    if (error := _import_error(module, name))
  ]
  if module.startswith('efficient_llm'):
    found += [
      f'{module} touches {name}; only a binary does.'
      for name in sorted(_used_names(tree))
      if any(_starts_with(name, prefix) for prefix in _BINARIES_ONLY)
    ]
  if _layer(module) == 'training':
    found += [
      f'{module} names a technique: {word}.'
      for word in sorted(set(_TECHNIQUE_WORD.findall(source)))
    ]
  return found


@pytest.mark.parametrize('module', _MODULES)
def test_a_module_keeps_to_the_import_order(module: str) -> None:
  assert not violations(module, _MODULES[module].read_text())


def test_every_module_imports_with_the_core_installed() -> None:
  names = [
    name.removesuffix('.__init__')
    for name in _MODULES
    if not (extra := _NEED_AN_EXTRA.get(name))
    or importlib.util.find_spec(extra)
  ]
  # Elsewhere, as binaries define flags and another test may import them.
  run = subprocess.run(
    [sys.executable, '-c', _IMPORT_ALL, *names],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr


def test_a_long_file_says_why() -> None:
  paths = [*_MODULES.values(), *(_ROOT / 'tests').rglob('*.py')]
  silent = [
    str(path.relative_to(_ROOT))
    for path in paths
    if len(lines := path.read_text().splitlines()) > _MAX_LINES
    and not any('Over 300 lines:' in line for line in lines[:30])
  ]
  assert not silent


def test_every_package_has_an_init_file() -> None:
  folders = {p.parent for p in _MODULES.values()}
  assert not [f for f in folders if not (f / '__init__.py').exists()]


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('efficient_llm.models.layers', 'from efficient_llm import optimizer'),
    ('efficient_llm.data.packing', 'import efficient_llm.optimizer'),
    ('efficient_llm.sharding', 'from efficient_llm.kernels import attention'),
    ('efficient_llm.training.loop', 'from efficient_llm.scaling import fit'),
    ('efficient_llm.training.loop', 'def f():\n  import experiments.runner'),
    ('efficient_llm.ligo.train', 'from efficient_llm.diloco import outer'),
    ('efficient_llm.ligo.train', 'from efficient_llm.tlt import grpo'),
    ('efficient_llm.speculative.tree', 'from efficient_llm.tlt import grpo'),
    ('efficient_llm.tlt.train', 'from efficient_llm.scaling import fit'),
    ('efficient_llm.__init__', 'from efficient_llm import typing'),
    ('efficient_llm.novelty', 'from efficient_llm import typing'),
    ('efficient_llm.models.layers', 'from . import transformer'),
    ('efficient_llm.training.loop', 'import os\nx = os.environ["A"]'),
    ('efficient_llm.training.loop', 'from os import environ as e\nx = e["A"]'),
    ('efficient_llm.training.loop', 'import os as o\nx = o.getenv("A")'),
    ('efficient_llm.data.corpus', 'from absl import flags'),
    ('efficient_llm.data.corpus', 'import absl.flags as f'),
    ('efficient_llm.sharding', 'import jax\njax.distributed.initialize()'),
    ('efficient_llm.sharding', 'from jax import distributed'),
    ('efficient_llm.training.step', '"""Serves DiLoCo."""'),
    ('experiments.pretrain', 'from benchmarks import train_mfu'),
  ],
)
def test_a_violation_is_found(module: str, source: str) -> None:
  assert len(violations(module, source)) >= 1


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('efficient_llm.models.layers', 'from efficient_llm.models import vision'),
    ('efficient_llm.training.loop', 'import os\nos.replace("a", "b")'),
    ('efficient_llm.training.loop', 'from efficient_llm import __version__'),
    ('efficient_llm.tlt.train', 'from efficient_llm.speculative import tree'),
    ('efficient_llm.ligo.train', 'from efficient_llm.training import loop'),
    ('experiments.pretrain', 'import os\nfrom absl import flags\nos.environ'),
    ('benchmarks.crash_resume', 'from experiments import pretrain'),
  ],
)
def test_what_the_order_allows_is_not_reported(
  module: str, source: str
) -> None:
  assert not violations(module, source)
