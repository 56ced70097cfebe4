"""Filling in text whose own language uses dollars and braces."""

import re

_FIELD = re.compile(r'@\{(\w+)\}')


def fill(template: str, **values: object) -> str:
  """Puts values in place of @{name}.

  A line that holds nothing but a field with an empty value goes; a value of
  several lines is indented as its field is.

  Raises:
    KeyError: If the template has a field without a value.
  """
  lines = []
  for line in template.splitlines():
    alone = _FIELD.fullmatch(line.strip())
    if alone:
      indent = line[: len(line) - len(line.lstrip())]
      value = str(values[alone[1]])
      lines += [f'{indent}{part}'.rstrip() for part in value.splitlines()]
    else:
      lines.append(_FIELD.sub(lambda field: str(values[field[1]]), line))
  return '\n'.join(lines) + '\n'
