"""Line charts for a report, drawn once for light and dark backgrounds."""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import axis as mpl_axis
from matplotlib import figure as mpl_figure
from matplotlib import ticker

from efficient_llm.training import sections, units

# A longer series is drawn as the mean and the range of this many stretches.
_MAX_POINTS = 300
_SMALLEST, _LARGEST = 1e-100, 1e100
# Stand-ins for the page's own colours, so that one drawing fits light and dark
# backgrounds: the page's style sheet gives each variable a value for both.
INK, GRID = '#010203', '#040506'
SERIES = ('#0a0101', '#0a0102', '#0a0103', '#0a0104', '#0a0105', '#0a0106')
COLOURS = {
  INK: 'var(--muted)',
  GRID: 'var(--line)',
  **{colour: f'var(--series-{i})' for i, colour in enumerate(SERIES)},
}
# Line styles differ as well, for people who cannot tell the colours apart.
_DASHES = ('solid', 'dashed', 'dotted')
_SUPERSCRIPTS = str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹')
_PLOT_SETTINGS: dict[Any, Any] = {
  'axes.edgecolor': INK,
  'axes.formatter.use_mathtext': False,
  'axes.labelcolor': INK,
  'axes.unicode_minus': True,
  'font.family': 'sans-serif',
  'font.size': 11,
  'grid.color': GRID,
  'grid.linewidth': 0.8,
  'lines.linewidth': 1.8,
  'lines.solid_capstyle': 'round',
  'path.simplify': True,
  'svg.fonttype': 'none',
  'svg.hashsalt': 'efficient_llm',
  'text.parse_math': False,
  'xtick.color': INK,
  'ytick.color': INK,
}


@dataclasses.dataclass(frozen=True)
class Series:
  """Points of one line; one not finite, or beyond 1e100, leaves a gap."""

  label: str
  x: Sequence[float]
  y: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Curve:
  """Lines over common axes.

  Attributes:
    title: Heading.
    series: The lines. Those of more than 300 points are drawn as the mean of
      stretches of equal length, with their range behind.
    x_label: What the horizontal axis counts.
    y_label: What the vertical axis measures, with its unit.
    log_x: Whether the horizontal axis is logarithmic; x <= 0 is then left out.
    log_y: The same for the vertical axis.
    from_zero: Whether a linear vertical axis starts at zero, so that noise in
      a rate does not look like change.
    note: A sentence below the drawing.
    alt: What the drawing shows, for those who cannot see it; by default made
      from the labels and the last values.
  """

  title: str
  series: Sequence[Series]
  x_label: str
  y_label: str
  log_x: bool = False
  log_y: bool = False
  from_zero: bool = False
  note: str = ''
  alt: str = ''

  def render(self) -> str:
    """Returns the section as an HTML fragment."""
    drawn = [(one, *self._points(one)) for one in self.series]
    drawn = [(one, x, y) for one, x, y in drawn if np.isfinite(y).any()]
    note = (
      f'<p class="note">{sections.escape(self.note)}</p>' if self.note else ''
    )
    if not drawn:
      empty = '<p class="empty">No data was recorded.</p>'
      return sections.frame(self.title, empty + note, kind='chart')
    # One line needs no legend; the empty list keeps neighbours level.
    legend = ''.join(
      f'<li><i class="{_DASHES[i % len(_DASHES)]}" '
      f'style="color:{COLOURS[SERIES[i % len(SERIES)]]}"></i>'
      f'{sections.escape(one.label)}</li>'
      for i, (one, _, _) in enumerate(drawn)
      if len(drawn) > 1
    )
    body = (
      f'<p class="axis">{sections.escape(self.y_label)}</p>'
      f'<ul class="legend">{legend}</ul>{self._svg(drawn)}{note}'
    )
    return sections.frame(self.title, body, kind='chart')

  def _points(self, one: Series) -> tuple[np.ndarray, np.ndarray]:
    """Returns the points that these axes can show, NaN for a gap."""
    x, y = np.asarray(one.x, float), np.asarray(one.y, float)
    if x.shape != y.shape or x.ndim != 1:
      raise ValueError(
        f'Series {one.label!r} must have one y per x, has {x.shape} and '
        f'{y.shape}; pass equally long lists.'
      )
    x, y = _drawable(x, self.log_x), _drawable(y, self.log_y)
    return x[~np.isnan(x)], y[~np.isnan(x)]

  def _svg(self, drawn: Sequence[tuple[Series, np.ndarray, np.ndarray]]) -> str:

    def paint(axes: mpl_axes.Axes) -> None:
      for i, (_, x, y) in enumerate(drawn):
        _draw_series(
          axes, x, y, SERIES[i % len(SERIES)], _DASHES[i % len(_DASHES)]
        )
      axes.set_xlabel(self.x_label)
      axes.set_xscale('log' if self.log_x else 'linear')
      axes.set_yscale('log' if self.log_y else 'linear')
      if self.from_zero and not self.log_y:
        axes.set_ylim(bottom=0)
      _label_ticks(axes.xaxis, self.log_x)
      _label_ticks(axes.yaxis, self.log_y)
      axes.grid(axis='y')

    return draw(paint, alt=self.alt or self._description(drawn))

  def _description(
    self, drawn: Sequence[tuple[Series, np.ndarray, np.ndarray]]
  ) -> str:
    ends = []
    for one, _, y in drawn:
      finite = y[np.isfinite(y)]
      ends.append(f'{one.label} from {finite[0]:.4g} to {finite[-1]:.4g}')
    return (
      f'{self.y_label or self.title} against {self.x_label}: {"; ".join(ends)}.'
    )


def draw(
  paint: Callable[[mpl_axes.Axes], None],
  *,
  alt: str,
  size: tuple[float, float] = (6.2, 3.5),
) -> str:
  """Makes a drawing in the report's style.

  Args:
    paint: Draws on the axes, in the colours `INK`, `GRID` and `SERIES`, which
      the page replaces by its own.
    alt: What the drawing shows, for those who cannot see it.
    size: Width and height; the page scales the whole to its width.

  Returns:
    An SVG element.
  """
  with matplotlib.rc_context(_PLOT_SETTINGS):
    figure = mpl_figure.Figure(figsize=size, layout='constrained')
    axes = figure.add_subplot()
    paint(axes)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.tick_params(which='both', length=0)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    file = io.StringIO()
    figure.savefig(file, format='svg', metadata={'Date': None})
  return _inline(file.getvalue(), alt)


def _drawable(values: np.ndarray, is_logarithmic: bool) -> np.ndarray:
  """Returns `values` with NaN for those that the axis cannot place."""
  # Nearer to the ends of float64, matplotlib's margins leave it.
  low = _SMALLEST if is_logarithmic else -_LARGEST
  return np.where((values >= low) & (values <= _LARGEST), values, np.nan)


def _draw_series(
  axes: mpl_axes.Axes, x: np.ndarray, y: np.ndarray, colour: str, dash: str
) -> None:
  """Draws a line, and dots where points are few enough to see each."""
  if len(x) > _MAX_POINTS:
    chunks = np.array_split(np.arange(len(x)), _MAX_POINTS)
    # A stretch without one finite value stays a gap.
    spans = [(x[part].mean(), y[part][np.isfinite(y[part])]) for part in chunks]
    x = np.array([middle for middle, _ in spans])
    y, low, high = (
      np.array([reduce(part) if len(part) else math.nan for _, part in spans])
      for reduce in (np.mean, np.min, np.max)
    )
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
  axes.plot(
    x,
    y,
    color=colour,
    linestyle=dash,
    marker='o' if len(x) <= 24 else None,
    markersize=3.5,
  )


def _label_ticks(axis: mpl_axis.Axis, is_logarithmic: bool) -> None:
  """Labels an axis in plain text; matplotlib's own labels are formulas."""
  if not is_logarithmic:
    axis.set_major_formatter(ticker.FuncFormatter(_tick))
    return
  low, high = axis.get_view_interval()
  axis.set_major_formatter(ticker.FuncFormatter(_power_tick))
  # Within a decade or so the powers of ten are too few to read from.
  if high < 30 * low:
    axis.set_minor_locator(ticker.LogLocator(subs=(2, 3, 5)))
    axis.set_minor_formatter(ticker.FuncFormatter(_tick))
  else:
    axis.set_minor_formatter(ticker.NullFormatter())


def _tick(value: float, position: int | None = None) -> str:
  del position  # matplotlib passes it to every formatter
  text = f'{value:.4g}'
  if 1e4 <= abs(value) < 1e15:
    text = units.format_count(value, num_digits=4)
  return text.replace('-', '\N{MINUS SIGN}')


def _power_tick(value: float, position: int | None = None) -> str:
  exponent = round(math.log10(value))
  if abs(exponent) <= 3:
    return _tick(value, position)
  return '10' + str(exponent).translate(_SUPERSCRIPTS)


def _inline(svg: str, alt: str) -> str:
  """Makes a drawing a part of the page: its colours, no ids of its own."""
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  # Generic ids would repeat from one drawing to the next.
  svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', '', svg)
  svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1', svg, count=1)
  svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1', svg, count=1)
  for stand_in, colour in COLOURS.items():
    svg = svg.replace(stand_in, colour)
  return svg.replace(
    '<svg', f'<svg role="img" aria-label="{sections.escape(alt)}"', 1
  )
