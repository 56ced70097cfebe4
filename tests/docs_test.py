"""Holds the pages in docs/ to the programs, settings and files they name."""

import dataclasses
import importlib.util
import pathlib
import re
import types
import typing

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_PAGES = sorted((_ROOT / 'docs').glob('*.md'))
_LINK = re.compile(r'\]\(([^)#\s]+)(?:#[^)]*)?\)')
_MODULE = re.compile(r'\b((?:experiments|benchmarks)(?:\.\w+)+)')
_FILE = re.compile(
  r'\b((?:benchmarks|docs|efficient_llm|experiments|tests)/[\w/]+'
  r'\.(?:html|json|md|py|sh))\b'
)
_SETTING = re.compile(r'--config\.([a-z][\w.]*\w)')


@pytest.fixture(scope='module')
def reference() -> types.ModuleType:
  spec = importlib.util.spec_from_file_location(
    'docs_reference', _ROOT / 'docs' / 'reference.py'
  )
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _setting_names(config_type: type, prefix: str = '') -> set[str]:
  """Dotted names of all settings and groups, without making a value."""
  names = set()
  for name, hint in typing.get_type_hints(config_type).items():
    names.add(prefix + name)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
      names |= _setting_names(hint, f'{prefix}{name}.')
  return names


def test_the_reference_holds_every_program_and_its_configuration(
  reference: types.ModuleType,
) -> None:
  text = reference.render()
  missing = []
  for path in (_ROOT / 'experiments').rglob('*.py'):
    source = path.read_text()
    if "__name__ == '__main__'" not in source:
      continue
    parts = path.relative_to(_ROOT).with_suffix('').parts
    module = '.'.join(part for part in parts if part != '__main__')
    names = re.findall(r'config_type=(?:\w+\.)*(\w+)', source)
    missing += [n for n in (module, *names) if f'\n### {n}\n' not in text]
  assert not missing


def test_a_setting_stands_with_its_type_its_default_and_what_it_is(
  reference: types.ModuleType,
) -> None:
  text = reference.render()
  assert (
    '| `num_steps` | a whole number | `0` | Updates of the operator; 0 leaves '
    'it as it begins. |'
  ) in text
  assert (
    '| `cities` | a list, each text | must be given | Where they stand; they '
    'are dealt out in turn. |'
  ) in text


def test_every_field_with_a_docstring_entry_exists(
  reference: types.ModuleType,
) -> None:
  wrong = []
  for program in reference.programs():
    if program.config_type is None:
      continue
    for one in reference.dataclasses_of(program.config_type):
      fields = {field.name for field in dataclasses.fields(one)}
      wrong += [(one, x) for x in reference.field_docs(one) if x not in fields]
  assert not wrong


def test_every_page_is_in_the_contents() -> None:
  index = (_ROOT / 'docs' / 'index.md').read_text()
  trees = re.findall(r'```{toctree}(.*?)```', index, flags=re.S)
  listed = {line.strip() for tree in trees for line in tree.splitlines()}
  assert {page.stem for page in _PAGES} - {'index'} <= listed


@pytest.mark.parametrize('page', _PAGES, ids=lambda page: page.name)
def test_a_page_names_only_what_exists(
  page: pathlib.Path, reference: types.ModuleType
) -> None:
  text = page.read_text()
  links = [x for x in _LINK.findall(text) if '://' not in x]
  assert not [x for x in links if not (page.parent / x).exists()]
  modules = [
    name
    for name in _MODULE.findall(text)
    if not (path := _ROOT / name.replace('.', '/')).is_dir()
    and not path.with_suffix('.py').is_file()
  ]
  assert not modules
  assert not [x for x in _FILE.findall(text) if not (_ROOT / x).exists()]
  known = {
    name
    for program in reference.programs()
    if program.config_type
    for name in _setting_names(program.config_type)
  }
  assert not set(_SETTING.findall(text)) - known


def test_every_recorded_result_is_explained() -> None:
  text = (_ROOT / 'docs' / 'measured.md').read_text()
  results = (_ROOT / 'benchmarks' / 'results').glob('*.json')
  names = [path.name for path in results if not path.stem.endswith('_quick')]
  assert names
  assert not [name for name in names if f'`{name}`' not in text]
