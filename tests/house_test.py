"""Holds the tools, the lock and the metadata to what is promised."""

import ast
import pathlib
import re
import subprocess
import sys

from packaging import requirements, utils

_ROOT = pathlib.Path(__file__).parents[1]
_LOCK = _ROOT / 'requirements.lock'


def _run(*command: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    command, cwd=_ROOT, capture_output=True, text=True, check=False
  )


def test_ruff_finds_nothing() -> None:
  run = _run(sys.executable, '-m', 'ruff', 'check', '.')
  assert run.returncode == 0, run.stdout + run.stderr


def test_the_code_is_formatted() -> None:
  run = _run(sys.executable, '-m', 'ruff', 'format', '--check', '.')
  assert run.returncode == 0, run.stdout + run.stderr


def test_the_type_checker_finds_nothing() -> None:
  run = _run(
    sys.executable, '-m', 'basedpyright', '--pythonpath', sys.executable
  )
  assert run.returncode == 0, run.stdout + run.stderr


def test_no_check_is_silenced_on_a_line() -> None:
  # Spelled so that this file does not find itself.
  silencer = re.compile(r'#\s*(no' r'qa|type:\s*ig' r'nore|pyright:)')
  silenced = [
    path.relative_to(_ROOT).as_posix()
    for folder in ('benchmarks', 'efficient_llm', 'experiments', 'tests')
    for path in (_ROOT / folder).rglob('*.py')
    if silencer.search(path.read_text())
  ]
  assert not silenced


def test_the_lock_names_no_index_and_no_place() -> None:
  found = re.findall(
    r'.*(?:https?:|file:|--index|--extra-index|--find-links|\s/\w).*',
    _LOCK.read_text(),
  )
  assert not found


def test_every_locked_package_has_a_hash() -> None:
  entries = re.split(r'\n(?=[a-z])', _LOCK.read_text())[1:]
  assert entries
  assert all('==' in e and '--hash=sha256:' in e for e in entries)


def test_the_lock_holds_no_accelerator_build() -> None:
  names = re.findall(r'^([\w.-]+)==', _LOCK.read_text(), re.MULTILINE)
  assert 'jax' in names
  heavy = re.compile(r'torch|nvidia|cuda|libtpu|triton')
  assert not [name for name in names if heavy.search(name)]


def _requirements() -> dict[str, list[requirements.Requirement]]:
  """Returns the requirements of setup.py by extra, the core under ''."""
  values = {
    ast.unparse(node.targets[0]): node.value
    for node in ast.parse((_ROOT / 'setup.py').read_text()).body
    if isinstance(node, ast.Assign)
  }
  lists = {
    '': ast.literal_eval(values['_CORE']),
    **ast.literal_eval(values['_EXTRAS']),
  }
  return {
    extra: [requirements.Requirement(line) for line in lines]
    for extra, lines in lists.items()
  }


def test_every_requirement_has_a_lower_and_an_upper_bound() -> None:
  for extra, items in _requirements().items():
    assert items, extra
    for item in items:
      operators = sorted(bound.operator for bound in item.specifier)
      assert operators == ['<', '>='], item


def test_the_lock_holds_the_core_and_dev_within_their_bounds() -> None:
  locked = re.findall(r'^([\w.-]+)==(\S+)', _LOCK.read_text(), re.MULTILINE)
  by_extra = _requirements()
  for item in by_extra[''] + by_extra['dev']:
    name = utils.canonicalize_name(item.name)
    versions = [v for locked_name, v in locked if locked_name == name]
    assert versions, name
    assert all(item.specifier.contains(v) for v in versions), (item, versions)


def test_slow_tests_run_only_when_asked_for(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'two_test.py').write_text(
    'import pytest\n'
    'def test_quick(): pass\n'
    '@pytest.mark.slow\n'
    'def test_long(): pass\n'
  )
  pytest = (sys.executable, '-m', 'pytest', '-p', 'tests.conftest', '-q')
  assert '1 passed, 1 deselected' in _run(*pytest, tmp_path).stdout
  assert '2 passed' in _run(*pytest, '--slow', tmp_path).stdout
