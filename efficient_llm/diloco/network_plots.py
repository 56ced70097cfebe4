"""Drawings of a simulated network: where the islands are, what each does."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from matplotlib import axes as mpl_axes

from efficient_llm.diloco import cities as cities_lib
from efficient_llm.diloco import network, network_exchange
from efficient_llm.training import chart, sections, units

_MARGIN_DEGREES = 12.0
# A link that is busier than this gets the next colour.
_BUSY = (0.1, 0.5, 0.9)
_BUSY_STYLES = ((2, 'dotted'), (0, 'dashed'), (4, 'solid'), (1, 'solid'))
_BUSY_LABELS = (
  'under 10 %',
  '10 to 50 %',
  '50 to 90 %',
  'over 90 % of the time',
)
_SPANS = {'compute': 0, 'wait': 1, 'send': 2}
_ARC_POINTS = 60


@dataclasses.dataclass(frozen=True)
class RouteMap:
  """Cities at longitude and latitude, links coloured by how busy they are."""

  title: str
  routes: tuple[network_exchange.Route, ...]

  def render(self) -> str:
    """Returns the section as an HTML fragment."""
    legend = _legend(
      (index, dash, label)
      for (index, dash), label in zip(_BUSY_STYLES, _BUSY_LABELS, strict=True)
    )
    between = [r for r in self.routes if r.start != r.end]
    lines = [f'{r.start.name} to {r.end.name} {r.busy:.0%}' for r in between]
    alt = f'Links between cities and how busy they are: {"; ".join(lines)}.'
    drawing = chart.draw(self._paint, alt=alt, size=(9.5, 4.6))
    return sections.frame(self.title, legend + drawing)

  def _paint(self, axes: mpl_axes.Axes) -> None:
    places = {p.name: p for r in self.routes for p in (r.start, r.end)}
    for route in sorted(self.routes, key=lambda route: route.busy):
      index, dash = _BUSY_STYLES[int(np.searchsorted(_BUSY, route.busy))]
      longitude, latitude = arc(route.start, route.end)
      axes.plot(longitude, latitude, color=chart.SERIES[index], linestyle=dash)
    for place in places.values():
      axes.plot(place.longitude, place.latitude, 'o', color=chart.INK)
      axes.annotate(
        place.name,
        (place.longitude, place.latitude),
        xytext=(4, 4),
        textcoords='offset points',
        fontsize=9,
        color=chart.INK,
      )
    latitudes = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    axes.set_xlim(-180, 180)
    axes.set_xticks(range(-180, 181, 30))
    axes.set_yticks(range(-90, 91, 30))
    axes.set_ylim(
      max(-90.0, float(np.nanmin(latitudes)) - _MARGIN_DEGREES),
      min(90.0, float(np.nanmax(latitudes)) + _MARGIN_DEGREES),
    )
    axes.grid()
    axes.set_xlabel('degrees east')
    axes.set_ylabel('degrees north')


@dataclasses.dataclass(frozen=True)
class Timeline:
  """What some islands did in the first rounds: two lanes for each.

  The wide lane is computing and waiting; the narrow one above it is the
  exchange, which goes on beside computing where it is overlapped.
  """

  title: str
  outcome: network.Outcome
  names: tuple[str, ...]

  def render(self) -> str:
    """Returns the section as an HTML fragment."""
    legend = _legend((i, 'solid', kind) for kind, i in _SPANS.items())
    shares = ', '.join(
      f'{name} {share:.0%}'
      for name, share in zip(
        self.names,
        self.outcome.utilization[self.outcome.shown],
        strict=True,
      )
    )
    drawing = chart.draw(
      self._paint,
      alt=f'Computing, sending and waiting; share of computing: {shares}.',
      size=(9.5, 1.2 + 0.38 * len(self.names)),
    )
    return sections.frame(self.title, legend + drawing)

  def _paint(self, axes: mpl_axes.Axes) -> None:
    unit_secs, unit = _time_unit(
      max(float(span.end.max()) for span in self.outcome.spans)
    )
    for kind, index in _SPANS.items():
      low, height = (-0.35, 0.22) if kind == 'send' else (-0.1, 0.42)
      spans = [span for span in self.outcome.spans if span.kind == kind]
      for row in range(len(self.names)):
        bars = [
          (span.start[row] / unit_secs, length / unit_secs)
          for span in spans
          if (length := span.end[row] - span.start[row]) > 0
        ]
        axes.broken_barh(
          _joined(bars), (row + low, height), facecolor=chart.SERIES[index]
        )
    axes.set_yticks(range(len(self.names)), self.names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(unit)


def arc(
  start: cities_lib.City, end: cities_lib.City
) -> tuple[np.ndarray, np.ndarray]:
  """Longitudes and latitudes of the great circle, NaN at the date line."""
  ends = np.radians(
    [(start.latitude, start.longitude), (end.latitude, end.longitude)]
  )
  lat, lon = ends[:, 0], ends[:, 1]
  points = np.stack(
    [np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1
  )
  angle = math.acos(float(np.clip(points[0] @ points[1], -1, 1)))
  if angle < 1e-9:
    return np.array([start.longitude]), np.array([start.latitude])
  share = np.linspace(0, 1, _ARC_POINTS)[:, None]
  way = (
    np.sin((1 - share) * angle) * points[0] + np.sin(share * angle) * points[1]
  ) / math.sin(angle)
  longitude = np.degrees(np.arctan2(way[:, 1], way[:, 0]))
  latitude = np.degrees(np.arcsin(np.clip(way[:, 2], -1, 1)))
  breaks = np.flatnonzero(np.abs(np.diff(longitude)) > 180) + 1
  return np.insert(longitude, breaks, np.nan), np.insert(
    latitude, breaks, np.nan
  )


def _legend(entries: Iterable[tuple[int, str, str]]) -> str:
  items = ''.join(
    f'<li><i class="{dash}" style="color:var(--series-{index})"></i>'
    f'{sections.escape(label)}</li>'
    for index, dash, label in entries
  )
  return f'<ul class="legend">{items}</ul>'


def _joined(bars: list[tuple[float, float]]) -> list[tuple[float, float]]:
  """Bars that touch as one, so that a long run stays a small drawing."""
  joined: list[tuple[float, float]] = []
  for start, length in bars:
    if joined and start <= sum(joined[-1]) * (1 + 1e-9):
      first = joined[-1][0]
      joined[-1] = (first, start + length - first)
    else:
      joined.append((start, length))
  return joined


def _time_unit(secs: float) -> tuple[float, str]:
  for unit_secs, name in ((86_400, 'days'), (3600, 'hours'), (60, 'minutes')):
    if secs >= 2 * unit_secs:
      return unit_secs, name
  return 1.0, 'seconds'


def island_names(outcome: network.Outcome) -> tuple[str, ...]:
  """Names the shown islands by number, city and step time."""
  islands = outcome.islands
  return tuple(
    f'{i} {islands.cities[islands.city[i]].name}, '
    f'{units.format_duration(float(islands.step_secs[i]))} a step'
    for i in outcome.shown
  )
