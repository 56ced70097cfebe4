"""Writes the configuration reference from the programs and their dataclasses.

Sphinx puts the text in place of the mark in `reference.md`, so that no copy of
a default can be out of date.
"""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re
import typing
from collections.abc import Iterator
from typing import Any

from experiments import overrides

ROOT = pathlib.Path(__file__).resolve().parents[1]
MARK = '<!-- reference -->'

_PROGRAM = "\nif __name__ == '__main__':"
_FIELD_DOC = re.compile(r'(\w+(?:, \w+)*): (.*)')
# What Markdown or the table would read as its own.
_SPECIAL = re.compile(r'([\\|*_<>$\[\]{}])')


@dataclasses.dataclass(frozen=True)
class Program:
  """A module that is run with `python -m`.

  Attributes:
    name: As it is run.
    doc: Its docstring.
    config_type: What its --config gives; None for a tool without one.
    default_config: The file used without --config.
  """

  name: str
  doc: str
  config_type: type | None
  default_config: str | None


def programs() -> list[Program]:
  """All programs of `experiments`, by name; none of them is imported.

  Importing would define their flags, and two programs may share a name.
  """
  found = []
  for path in sorted((ROOT / 'experiments').rglob('*.py')):
    source = path.read_text(encoding='utf-8')
    if _PROGRAM not in source:
      continue
    parts = path.relative_to(ROOT).with_suffix('').parts
    tree = ast.parse(source)
    given = _keywords_of_main(tree)
    found.append(
      Program(
        name='.'.join(part for part in parts if part != '__main__'),
        doc=ast.get_docstring(tree) or '',
        config_type=_load(given['config_type'], tree)
        if 'config_type' in given
        else None,
        default_config=given.get('default_config', '').strip("'") or None,
      )
    )
  return found


def dataclasses_of(config_type: type) -> Iterator[type]:
  """Yields a configuration and all that it is made of, from the top down."""
  yield config_type
  for hint in typing.get_type_hints(config_type).values():
    for one in (hint, *typing.get_args(hint)):
      if isinstance(one, type) and dataclasses.is_dataclass(one):
        yield from dataclasses_of(one)


def field_docs(config_type: type) -> dict[str, str]:
  """The text on each field under "Attributes:", of base classes too."""
  docs: dict[str, str] = {}
  for one in reversed(config_type.__mro__):
    _, _, text = inspect.cleandoc(one.__doc__ or '').partition('Attributes:\n')
    names: list[str] = []
    for line in text.splitlines():
      if line and not line.startswith('  '):
        break
      entry = _FIELD_DOC.fullmatch(line[2:])
      if entry:
        names = entry[1].split(', ')
        docs.update(dict.fromkeys(names, entry[2]))
      else:
        docs.update({name: f'{docs[name]} {line.strip()}' for name in names})
  return {name: text.strip() for name, text in docs.items()}


def render() -> str:
  """The reference as MyST Markdown."""
  found = programs()
  types = dict.fromkeys(
    one
    for program in found
    if program.config_type
    for one in dataclasses_of(program.config_type)
  )
  parts = ['## Programs', *map(_program_text, found), '## Settings']
  return '\n\n'.join([*parts, *map(_type_text, types)]) + '\n'


def _keywords_of_main(tree: ast.Module) -> dict[str, str]:
  """Source of what a program gives to the `main` that it calls."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith('.main'):
      return {str(k.arg): ast.unparse(k.value) for k in node.keywords}
  return {}


def _load(name: str, tree: ast.Module) -> type:
  """The class that a module knows by a name, such as `pretrain.Config`."""
  head, *rest = name.split('.')
  for node in tree.body:
    if isinstance(node, ast.ImportFrom):
      for alias in node.names:
        if head == (alias.asname or alias.name):
          *modules, last = [str(node.module), alias.name, *rest]
          return getattr(importlib.import_module('.'.join(modules)), last)
  raise ValueError(f'{name} must be imported at the top of its program.')


def _program_text(program: Program) -> str:
  summary, _, rest = program.doc.partition('\n\n')
  parts = [f'### {program.name}', _escaped(summary)]
  if rest:
    parts.append(f'```text\n{rest}\n```')
  if program.config_type:
    parts.append(
      f'Settings: {_link(program.config_type)}; without `--config` those of '
      f'`{program.default_config}`.'
    )
  return '\n\n'.join(parts)


def _type_text(config_type: type) -> str:
  docs = field_docs(config_type)
  hints = typing.get_type_hints(config_type)
  rows = [
    f'| `{field.name}` | {_type_name(hints[field.name])} '
    f'| {_default(field)} '
    f'| {_escaped(docs.get(field.name) or _summary(hints[field.name]))} |'
    for field in dataclasses.fields(config_type)
  ]
  return '\n'.join(
    [
      f'({_anchor(config_type)})=',
      f'### {config_type.__name__}',
      '',
      _escaped(_summary(config_type)),
      f'(`{config_type.__module__}`)',
      '',
      '| setting | type | default | what it is |',
      '| --- | --- | --- | --- |',
      *rows,
    ]
  )


def _summary(hint: Any) -> str:
  """What a dataclass says of itself before its fields; else nothing."""
  doc = hint.__doc__ if dataclasses.is_dataclass(hint) else None
  return inspect.cleandoc(doc or '').partition('Attributes:\n')[0]


def _type_name(hint: Any) -> str:
  if isinstance(hint, type) and dataclasses.is_dataclass(hint):
    return _link(hint)
  for inner in typing.get_args(hint):
    if isinstance(inner, type) and dataclasses.is_dataclass(inner):
      return f'a list of {_link(inner)}'
  return _escaped(overrides.describe(hint))


def _default(field: dataclasses.Field[Any]) -> str:
  value = field.default
  if field.default_factory is not dataclasses.MISSING:
    value = field.default_factory()
  if value is dataclasses.MISSING:
    return 'must be given'
  if not dataclasses.is_dataclass(value):
    return f'`{value!r}`'
  changed = [
    f'`{name}={getattr(value, name)!r}`'
    for name in (one.name for one in dataclasses.fields(value))
    if getattr(value, name) != getattr(type(value), name, None)
  ]
  return 'its own, with ' + ', '.join(changed) if changed else 'its own'


def _anchor(config_type: type) -> str:
  return f'{config_type.__module__}.{config_type.__name__}'.lower()


def _link(config_type: type) -> str:
  return f'[{config_type.__name__}](#{_anchor(config_type)})'


def _escaped(text: str) -> str:
  """Text on one line as Markdown that shows it; code stays code."""
  parts = re.split(r'(`[^`]*`)', ' '.join(text.split()))
  return ''.join(
    part if part.startswith('`') else _SPECIAL.sub(r'\\\1', part)
    for part in parts
  )
