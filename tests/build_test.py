"""Holds BUILD to the imports; `python -m tests.build_test --write` makes it.

Every module gets one target whose deps are its imports and nothing else. A
test also depends on what hands it to pytest.
"""

import argparse
import ast
import pathlib
import re
import sys
from collections.abc import Iterator

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_FOLDERS = ('benchmarks', 'efficient_llm', 'experiments', 'tests')
_RUNNER = 'tests/runner.py'
_CONFTEST = 'tests/conftest.py'
# Distributions whose name is not the name they are imported by.
_DISTRIBUTIONS = {
  'PIL': 'pillow',
  'absl': 'absl_py',
  'grpc': 'grpcio',
  'orbax': 'orbax_checkpoint',
  'sklearn': 'scikit_learn',
  'yaml': 'pyyaml',
}
_HEADER = '''"""Targets of the project, one per module; deps are the imports.

Made by `./run.sh python -m tests.build_test --write`; do not edit.
"""

load("@rules_python//python:defs.bzl", "py_binary", "py_library", "py_test")

package(default_visibility = ["//visibility:public"])

licenses(["notice"])

exports_files(["LICENSE"])

# For tests that start programs or read the sources.
filegroup(
    name = "checkout",
    srcs = glob(
        ["**"],
        exclude = [
            ".*/**",
            "out/**",
        ],
    ),
)
'''


def _sources() -> list[str]:
  """Returns the project's Python files, as paths from the root, sorted.

  Without notebooks, which are run and not imported.
  """
  return sorted(
    path.relative_to(_ROOT).as_posix()
    for folder in _FOLDERS
    for path in (_ROOT / folder).rglob('*.py')
    if 'colabs' not in path.parts
  )


def _target(source: str) -> str:
  return source.removesuffix('.py').removesuffix('/__init__')


def _imported_names(source: str) -> Iterator[tuple[str, ...]]:
  """Yields the dotted names a file imports, most specific first."""
  for node in ast.walk(ast.parse((_ROOT / source).read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield (alias.name,)
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        yield (f'{node.module}.{alias.name}', node.module)


def _label(names: tuple[str, ...]) -> str | None:
  """Returns the label an import needs; None for the standard library.

  Raises:
    ValueError: If one of our modules is imported that does not exist.
  """
  top = names[0].partition('.')[0]
  if top in sys.stdlib_module_names or top == '__future__':
    return None
  if top not in _FOLDERS:
    name = _DISTRIBUTIONS.get(top, top)
    return f'@pypi//{name.lower()}'
  for name in names:
    path = _ROOT / name.replace('.', '/')
    if path.with_suffix('.py').is_file() or (path / '__init__.py').is_file():
      return ':' + name.replace('.', '/')
  raise ValueError(f'{names[0]} does not exist; correct the import.')


def _deps(source: str) -> list[str]:
  labels = {_label(names) for names in _imported_names(source)}
  labels.discard(':' + _target(source))
  return sorted(label for label in labels if label)


def _rule(source: str) -> str:
  if source.endswith('_test.py'):
    return 'py_test'
  text = (_ROOT / source).read_text()
  is_program = "\nif __name__ == '__main__':" in text
  return 'py_binary' if is_program else 'py_library'


def _render(rule: str, **attributes: str | int | list[str]) -> str:
  """Writes one rule as buildifier would."""
  lines = []
  for name, value in attributes.items():
    if isinstance(value, str):
      lines.append(f'    {name} = "{value}",')
    elif isinstance(value, int):
      lines.append(f'    {name} = {value},')
    elif len(value) == 1:
      lines.append(f'    {name} = ["{value[0]}"],')
    elif value:
      items = [f'        "{item}",' for item in value]
      lines += [f'    {name} = [', *items, '    ],']
  return '\n'.join([f'{rule}(', *lines, ')\n'])


def _test_rule(source: str) -> str:
  text = (_ROOT / source).read_text()
  is_slow = bool(re.search(r'^[^#\'"]*\bpytest\.mark\.slow\b', text, re.M))
  starts_programs = bool(re.search(r'^import subprocess$', text, re.M))
  reads_checkout = starts_programs or '__file__' in text
  return _render(
    'py_test',
    name=_target(source),
    size='large' if is_slow else 'medium' if starts_programs else 'small',
    srcs=sorted([source, _RUNNER]),
    args=[source, *(['--slow'] if is_slow else [])],
    data=[':checkout' if reads_checkout else 'pyproject.toml'],
    imports=['.'],
    # No __init__.py but ours.
    legacy_create_init=0,
    main=_RUNNER,
    tags=['slow'] if is_slow else [],
    deps=sorted(
      {*_deps(source), *_deps(_RUNNER), ':' + _target(_CONFTEST)},
      key=_label_order,
    ),
  )


def _label_order(label: str) -> tuple[bool, str]:
  return label.startswith('@'), label


def build_text() -> str:
  """Returns the BUILD file that matches the sources as they are."""
  targets = []
  for source in _sources():
    rule = _rule(source)
    if rule == 'py_test':
      targets.append(_test_rule(source))
      continue
    deps = sorted(_deps(source), key=_label_order)
    targets.append(
      _render(
        rule,
        name=_target(source),
        srcs=[source],
        imports=['.'],
        deps=deps,
      )
    )
  return '\n'.join([_HEADER, *targets])


def test_build_file_matches_the_imports() -> None:
  written = (_ROOT / 'BUILD').read_text()
  assert written == build_text(), (
    'BUILD differs from the imports; run '
    './run.sh python -m tests.build_test --write'
  )


def test_a_dependency_from_outside_is_locked_or_an_extra() -> None:
  text = (_ROOT / 'requirements.lock').read_text()
  text += (_ROOT / 'setup.py').read_text()
  names = re.findall(r"(?:^|')([\w.-]+)(?:\[\w+\])?[=>]=", text, re.M)
  known = {re.sub(r'[-_.]+', '_', name).lower() for name in names}
  used = {
    label.removeprefix('@pypi//')
    for source in _sources()
    for label in _deps(source)
    if label.startswith('@')
  }
  assert used <= known


def test_an_import_of_a_missing_module_is_refused() -> None:
  with pytest.raises(ValueError, match=r'efficient_llm\.absent'):
    _label(('efficient_llm.absent.thing', 'efficient_llm.absent'))


@pytest.mark.parametrize(
  ('names', 'label'),
  [
    (('os.path',), None),
    (('jax.numpy',), '@pypi//jax'),
    (('absl.flags', 'absl'), '@pypi//absl_py'),
    (('orbax.checkpoint.v1', 'orbax.checkpoint'), '@pypi//orbax_checkpoint'),
    (('efficient_llm.typing', 'efficient_llm'), ':efficient_llm/typing'),
    (('efficient_llm.__version__', 'efficient_llm'), ':efficient_llm'),
  ],
)
def test_an_import_gives_the_label_of_what_it_loads(
  names: tuple[str, ...], label: str | None
) -> None:
  assert _label(names) == label


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--write', action='store_true', required=True)
  parser.parse_args()
  (_ROOT / 'BUILD').write_text(build_text())
