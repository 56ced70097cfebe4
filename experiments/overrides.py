"""Typed command-line overrides of nested configuration dataclasses."""

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

_TRUE, _FALSE = ('true', '1', 'yes'), ('false', '0', 'no')
_LONGEST_SHOWN = 80
# What `ast.literal_eval` raises for text that is no literal.
_LITERAL_ERRORS = (
  SyntaxError,
  ValueError,
  TypeError,
  MemoryError,
  RecursionError,
)


def apply_overrides(config: Any, overrides: Mapping[str, str]) -> Any:
  """Copies a configuration with some fields changed.

  Args:
    config: A frozen dataclass, possibly nested.
    overrides: Text by dotted field name, such as {'data.batch_size': '64'}.

  Returns:
    The changed copy.

  Raises:
    ValueError: If a field is unknown (with near names) or its text is not of
      its type.
  """
  for name, text in overrides.items():
    names = name.split('.')
    if not _leads_to(config, names):
      raise ValueError(_unknown(config, name))
    config = _override(config, names, text, full_name=name)
  return config


def check_types(config: Any, prefix: str = '') -> None:
  """Refuses a field whose value is not of its declared type."""
  hints = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    value, hint = getattr(config, field.name), hints[field.name]
    name = f'{prefix}{field.name}'
    if dataclasses.is_dataclass(value) and isinstance(value, hint):
      check_types(value, f'{name}.')
    elif not _is_a(value, hint):
      raise ValueError(
        f'config.{name}={value!r} must be {describe(hint)}; change it in the '
        'configuration file.'
      )


def field_names(config: Any, prefix: str = '') -> Iterator[str]:
  """Dotted names of all fields that are not dataclasses themselves."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from field_names(value, f'{prefix}{field.name}.')
    else:
      yield f'{prefix}{field.name}'


def parse(text: str, hint: Any, *, name: str) -> Any:
  """Reads a value of the declared type.

  Whole numbers may be written 1e9 or 1_000; tuples with commas; None as none.

  Raises:
    ValueError: If the text is no such value.
  """
  options = _options(hint)
  if type(None) in options and text.strip().lower() in ('none', 'null'):
    return None
  for option in options:
    if option is not type(None):
      try:
        return _parse_one(text, option, name=name)
      except ValueError:
        continue
  remedy = f'for example --config.{name}={_example(options)}'
  if any(
    dataclasses.is_dataclass(x) for o in options for x in typing.get_args(o)
  ):
    remedy = 'set it in a configuration file'
  raise ValueError(
    f'--config.{name}={_shown(text)} must be {describe(hint)}; {remedy}.'
  )


def describe(hint: Any) -> str:
  """Names a type as people would."""
  words = {
    int: 'a whole number',
    float: 'a number',
    bool: 'true or false',
    str: 'text',
    type(None): 'none',
  }
  parts = []
  for option in _options(hint):
    origin = typing.get_origin(option)
    if origin is Literal:
      parts.append('one of ' + ', '.join(map(str, typing.get_args(option))))
    elif origin is tuple:
      parts.append(f'a list, each {describe(typing.get_args(option)[0])}')
    else:
      parts.append(words.get(option, getattr(option, '__name__', str(option))))
  return ' or '.join(parts)


def _leads_to(config: Any, path: list[str]) -> bool:
  """Whether a path names a field, or goes on behind one that has no fields."""
  for name in path:
    if not dataclasses.is_dataclass(config):
      return True
    if name not in {field.name for field in dataclasses.fields(config)}:
      return False
    config = getattr(config, name)
  return True


def _override(
  config: Any, path: list[str], text: str, *, full_name: str
) -> Any:
  name, *rest = path
  value = getattr(config, name)
  if dataclasses.is_dataclass(value):
    if not rest:
      inner = dataclasses.fields(value)[0].name
      raise ValueError(
        f'--config.{full_name} is a group of fields; set one of them, for '
        f'example --config.{full_name}.{inner}.'
      )
    changed = _override(value, rest, text, full_name=full_name)
  elif rest:
    raise ValueError(
      f'--config.{_shown(full_name)} does not exist: {name} is a single field; '
      f'set --config.{full_name.removesuffix("." + ".".join(rest))}.'
    )
  else:
    hint = typing.get_type_hints(type(config))[name]
    changed = parse(text, hint, name=full_name)
  return dataclasses.replace(config, **{name: changed})


def _unknown(config: Any, name: str) -> str:
  """Says that there is no such field, and which one may have been meant."""
  known = list(field_names(config))
  last = name.rsplit('.', 1)[-1]
  # In a forgotten or wrong group the last part is right.
  near = [found for found in known if found.rsplit('.', 1)[-1] == last]
  near = near or difflib.get_close_matches(name, known)
  if near:
    remedy = f'did you mean {" or ".join(near[:3])}?'
  else:
    remedy = '--print_config shows all fields.'
  return (
    f'--config.{_shown(name)} is not a field of the configuration; {remedy}'
  )


def _shown(text: str) -> str:
  """The user's text as part of a line."""
  line = ' '.join(text.split())
  return line if len(line) <= _LONGEST_SHOWN else line[:_LONGEST_SHOWN] + '...'


def _options(hint: Any) -> tuple[Any, ...]:
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return typing.get_args(hint)
  return (hint,)


def _parse_one(text: str, hint: Any, *, name: str) -> Any:
  origin = typing.get_origin(hint)
  if origin is Literal:
    for choice in typing.get_args(hint):
      if text == str(choice):
        return choice
    raise ValueError(text)
  if origin is tuple:
    return _parse_tuple(text, typing.get_args(hint)[0], name=name)
  if hint is bool:
    lowered = text.strip().lower()
    if lowered in _TRUE or lowered in _FALSE:
      return lowered in _TRUE
    raise ValueError(text)
  if hint is int:
    return _parse_int(text)
  if hint is float:
    return _parse_float(text)
  if hint is str:
    return text
  raise ValueError(text)


def _parse_float(text: str) -> float:
  number = float(text)
  if not math.isfinite(number):
    raise ValueError(text)
  return number


def _parse_int(text: str) -> int:
  try:
    return int(text)
  except ValueError:
    number = float(text)
  # Above 2^53 a float no longer says which whole number was meant.
  if not number.is_integer() or abs(number) > 2**53:
    raise ValueError(text)
  return int(number)


def _parse_tuple(text: str, element: Any, *, name: str) -> tuple[Any, ...]:
  text = text.strip()
  if text[:1] in ('(', '['):
    try:
      items = ast.literal_eval(text)
    except _LITERAL_ERRORS as error:
      raise ValueError(text) from error
    if not isinstance(items, (list, tuple)):
      raise ValueError(text)
    return tuple(parse(str(item), element, name=name) for item in items)
  if not text:
    return ()
  return tuple(
    parse(item.strip(), element, name=name) for item in text.split(',')
  )


def _example(options: tuple[Any, ...]) -> str:
  option = next(o for o in options if o is not type(None))
  origin = typing.get_origin(option)
  if origin is Literal:
    return str(typing.get_args(option)[0])
  if origin is tuple:
    element = _example(typing.get_args(option)[:1])
    return f'{element},{element}'
  return {int: '1000', float: '0.001', bool: 'true'}.get(option, 'text')


def _is_a(value: Any, hint: Any) -> bool:
  for option in _options(hint):
    origin = typing.get_origin(option)
    if origin is Literal:
      matches = value in typing.get_args(option)
    elif origin is tuple:
      element = typing.get_args(option)[0]
      matches = isinstance(value, tuple) and all(
        _is_a(item, element) for item in value
      )
    elif option is float:
      matches = _is_a(value, int) or (
        isinstance(value, float) and math.isfinite(value)
      )
    elif option is int:
      matches = isinstance(value, int) and not isinstance(value, bool)
    else:
      matches = isinstance(value, option)
    if matches:
      return True
  return False
