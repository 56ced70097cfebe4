"""What a run of islands looks like, to read in a browser and nothing else."""

import contextlib
import functools
import http.server
import ipaddress
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib import axes as mpl_axes

from efficient_llm.diloco.wan import hub as hub_lib
from efficient_llm.diloco.wan import status
from efficient_llm.training import chart, page, sections, strict_json, units

_REFRESH_SECS = 5
_SHOWN_SECS = 300.0
_LANES = {'compute': (0.0, 0.8), 'waiting': (0.0, 0.8), 'sending': (0.25, 0.3)}


def render(hub: hub_lib.Hub) -> str:
  """The state of a run as a page of HTML.

  Args:
    hub: Of the run.
  """
  now = status.status(hub)
  present = sum(x['state'] != 'away' for x in now['islands'])
  used = [x['utilisation'] for x in now['islands'] if x['utilisation']]
  rate = now['tokens_per_sec']
  parts: list[sections.Section] = [
    sections.KeyNumbers(
      [
        sections.Tile('Round', f'{now["round"]} of {now["rounds"]}'),
        sections.Tile('Islands', present, note='with a link'),
        sections.Tile('Tokens', units.format_count(now['tokens'])),
        sections.Tile(
          'Tokens a second', '' if rate is None else units.format_count(rate)
        ),
        sections.Tile(
          'Utilisation',
          f'{sum(used) / len(used):.1%}' if used else '',
          note='of the time, mean',
        ),
        sections.Tile('Refused', now['counts']['refused'], note='updates'),
      ]
    ),
    _Timeline(now['islands']),
    sections.Table(
      'Islands',
      (
        'Island',
        'State',
        'Steps',
        'Tokens',
        'Loss',
        'Steps/s',
        'Utilisation',
        'MB up',
        'MB down',
        'Versions',
        'Refused',
        'Note',
      ),
      [
        (
          x['name'],
          x['state'],
          x['steps'],
          x['tokens'],
          x['loss'],
          x['steps_per_sec'],
          '' if x['utilisation'] is None else f'{x["utilisation"]:.1%}',
          x['bytes_up'] / 1e6,
          x['bytes_down'] / 1e6,
          ' '.join(str(version) for version in x['versions']),
          x['refused'],
          x['note'],
        )
        for x in now['islands']
      ],
    ),
  ]
  history = [x for x in now['history'] if x['loss'] is not None]
  if history:
    rounds = [x['round'] for x in history]
    losses = chart.Series(
      'mean of islands', rounds, [x['loss'] for x in history]
    )
    parts.append(chart.Curve('Loss', [losses], 'rounds', 'nats per token'))
    tokens = chart.Series(
      'tokens', [x['secs'] for x in history], [x['tokens'] for x in history]
    )
    parts.append(
      chart.Curve('Tokens that count', [tokens], 'seconds', 'tokens')
    )
  if now['refusals']:
    parts.append(
      sections.Table(
        'Refused',
        ('Seconds', 'Island', 'Why'),
        [
          (round(x['secs']), x['island'], x['reason'])
          for x in reversed(now['refusals'][-50:])
        ],
      )
    )
  return page.render(
    'Islands', parts, subtitle='read only, made anew each time'
  )


class _Timeline:
  """What each island did in the last minutes."""

  def __init__(self, islands: Sequence[dict[str, Any]]):
    self._islands = [x for x in islands if x['spans']]

  def render(self) -> str:
    """The section as an HTML fragment."""
    title = 'What islands do'
    if not self._islands:
      return sections.frame(title, '<p class="empty">Nothing yet.</p>')
    end = max(span[2] for x in self._islands for span in x['spans'])
    legend = ''.join(
      f'<li><i style="color:{chart.COLOURS[chart.SERIES[i]]}"></i>{kind}</li>'
      for i, kind in enumerate(_LANES)
    )
    drawing = chart.draw(
      functools.partial(self._paint, end),
      alt=f'{len(self._islands)} islands computing, waiting and sending.',
      size=(10.0, 0.9 + 0.45 * len(self._islands)),
    )
    return sections.frame(title, f'<ul class="legend">{legend}</ul>{drawing}')

  def _paint(self, end: float, axes: mpl_axes.Axes) -> None:
    for row, island in enumerate(self._islands):
      for i, (kind, (below, height)) in enumerate(_LANES.items()):
        bars = [
          (start - end, stop - start)
          for which, start, stop in island['spans']
          if which == kind and stop > end - _SHOWN_SECS
        ]
        axes.broken_barh(
          bars, (row + below, height), facecolors=chart.SERIES[i]
        )
    axes.set_yticks(
      [row + 0.4 for row in range(len(self._islands))],
      [x['name'] for x in self._islands],
    )
    axes.invert_yaxis()
    axes.set_xlim(-_SHOWN_SECS, 0)
    axes.set_xlabel('seconds before the last news')


@contextlib.contextmanager
def serving(hub: hub_lib.Hub, address: str) -> Iterator[str]:
  """Serves the page at / and its numbers at /status.json, from a thread.

  Args:
    hub: Of the run.
    address: HOST:PORT; port 0 takes a free one.

  Yields:
    The address it is served at.

  Raises:
    ValueError: If it cannot be served there.
  """
  host, port = parse_address(address)

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
      if self.path == '/status.json':
        self._answer(
          strict_json.to_json(status.status(hub)), 'application/json'
        )
      elif self.path == '/':
        self._answer(render(hub), 'text/html; charset=utf-8')
      else:
        self.send_error(404)

    def _answer(self, text: str, kind: str) -> None:
      body = text.encode('utf-8', errors='replace')
      self.send_response(200)
      self.send_header('Content-Type', kind)
      self.send_header('Content-Length', str(len(body)))
      self.send_header('Cache-Control', 'no-store')
      self.send_header('X-Content-Type-Options', 'nosniff')
      self.send_header('Refresh', str(_REFRESH_SECS))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
      """Says nothing: a page that is watched asks all the time."""

  try:
    server = http.server.ThreadingHTTPServer((host, port), Handler)
  except OSError as error:
    raise ValueError(
      f'--page={address} cannot be served: {error.strerror or error}; choose '
      'another port.'
    ) from error
  with server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
      yield f'{host}:{server.server_address[1]}'
    finally:
      server.shutdown()


def parse_address(address: str) -> tuple[str, int]:
  """Parts HOST:PORT.

  Raises:
    ValueError: If it is not of that form.
  """
  host, _, port = address.rpartition(':')
  host = host.strip('[]')
  if not host or not port.isdecimal() or int(port) >= 1 << 16:
    raise ValueError(f'{address!r} must be HOST:PORT, such as 127.0.0.1:8080.')
  return host, int(port)


def is_loopback(host: str) -> bool:
  """Whether a host is only this machine."""
  if host == 'localhost':
    return True
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False
