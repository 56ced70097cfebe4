"""Sections that a report is made of, each rendered to HTML without scripts.

A section is a small frozen dataclass with `render() -> str`. Everything that
comes from a run is escaped here, and nowhere else.
"""

import dataclasses
import html
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

_NUMBER_STYLE = ' class="number"'


class Section(Protocol):
  """One part of a report."""

  def render(self) -> str:
    """Returns the section as an HTML fragment, with its data escaped."""
    ...


@dataclasses.dataclass(frozen=True)
class Text:
  """Paragraphs, set apart by blank lines in `body`."""

  title: str
  body: str

  def render(self) -> str:
    """Returns the section as an HTML fragment."""
    paragraphs = re.split(r'\n\s*\n', self.body.strip())
    return frame(
      self.title, ''.join(f'<p>{escape(part)}</p>' for part in paragraphs)
    )


@dataclasses.dataclass(frozen=True)
class Tile:
  """One figure of a run; a number is written in four digits."""

  label: str
  value: str | float
  unit: str = ''
  note: str = ''


@dataclasses.dataclass(frozen=True)
class KeyNumbers:
  """The figures to see first, large."""

  tiles: Sequence[Tile]
  title: str = ''

  def render(self) -> str:
    """Returns the section as an HTML fragment."""
    tiles = ''.join(
      f'<div class="tile"><dt>{escape(tile.label)}</dt>'
      f'<dd><b>{escape(_cell(tile.value))}</b>'
      f'<span class="unit"> {escape(tile.unit)}</span>'
      f'<small>{escape(tile.note)}</small></dd></div>'
      for tile in self.tiles
    )
    return frame(self.title, f'<dl class="tiles">{tiles}</dl>')


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows under a header; numbers are aligned to the right."""

  title: str
  header: Sequence[str]
  rows: Sequence[Sequence[Any]]
  note: str = ''

  def render(self) -> str:
    """Returns the section as an HTML fragment."""
    widths = {len(row) for row in self.rows} - {len(self.header)}
    if widths:
      raise ValueError(
        f'Every row of table {self.title!r} must have {len(self.header)} '
        f'cells, one has {min(widths)}; fill the missing ones with None.'
      )
    # A header stands over its numbers, at the right.
    columns = zip(*self.rows, strict=True) if self.rows else ()
    right = [all(_is_number(value) for value in column) for column in columns]
    head = ''.join(
      f'<th scope="col"{_NUMBER_STYLE if is_right else ""}>{escape(name)}</th>'
      for name, is_right in itertools.zip_longest(self.header, right)
    )
    note = f'<p class="note">{escape(self.note)}</p>' if self.note else ''
    return frame(
      self.title,
      f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
      f'<tbody>{_rows(self.rows)}</tbody></table></div>{note}',
    )


@dataclasses.dataclass(frozen=True)
class Sample:
  """What a model wrote after `prompt`."""

  text: str
  prompt: str = ''


@dataclasses.dataclass(frozen=True)
class Samples:
  """Text from a model, as it is, with the prompt set apart."""

  samples: Sequence[Sample]
  title: str = 'Samples'

  def render(self) -> str:
    """Returns the section as an HTML fragment."""
    # The parser drops a newline right after <pre>, so one goes there.
    return frame(
      self.title,
      ''.join(
        f'<pre>\n<mark>{escape(sample.prompt)}</mark>'
        f'{escape(sample.text)}</pre>'
        for sample in self.samples
      ),
    )


@dataclasses.dataclass(frozen=True)
class Configuration:
  """Nested settings, folded away, under the names a flag would set."""

  values: Mapping[str, Any]
  title: str = 'Configuration'

  def render(self) -> str:
    """Returns the section as an HTML fragment."""
    rows = list(_flatten(self.values, ''))
    return (
      f'<section><details><summary><h2>{escape(self.title)}</h2> '
      f'<span class="unit">{len(rows)} settings</span></summary>'
      f'<div class="scroll"><table class="settings"><tbody>{_rows(rows)}'
      '</tbody></table></div></details></section>'
    )


def escape(text: str) -> str:
  """Makes text safe between tags and in quoted attributes."""
  return html.escape(text, quote=True)


def frame(title: str, body: str, *, kind: str = '') -> str:
  """Puts an HTML fragment under a heading; `kind` is its style class."""
  heading = f'<h2>{escape(title)}</h2>' if title else ''
  style = f' class="{kind}"' if kind else ''
  return f'<section{style}>{heading}{body}</section>'


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f'{value:.4g}'
  if isinstance(value, int) and not isinstance(value, bool):
    return f'{value:,}'
  return '' if value is None else str(value)


def _rows(rows: Sequence[Sequence[Any]]) -> str:
  lines = []
  for row in rows:
    cells = ''.join(
      f'<td{_NUMBER_STYLE if _is_number(value) else ""}>'
      f'{escape(_cell(value))}</td>'
      for value in row
    )
    lines.append(f'<tr>{cells}</tr>')
  return ''.join(lines)


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _flatten(
  values: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, str]]:
  """Yields dotted names and what they are set to, as text."""
  for name, value in values.items():
    if isinstance(value, Mapping) and value:
      yield from _flatten(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', str(value)
