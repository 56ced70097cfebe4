"""Progress on a terminal or in a batch log, and the rates it shows."""

import collections
import contextlib
import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Self, TextIO

import absl.logging
from rich import console as rich_console
from rich import live as rich_live
from rich import progress_bar
from rich import table as rich_table
from rich import text as rich_text

from efficient_llm.training import units

# Four a second look live and cost nothing beside a train step.
_MIN_REFRESH_SECS = 0.25


class RateMeter:
  """Steps and tokens per second over a moving window of training time.

  Time inside `pause()` (compilation, evaluation, checkpoints) does not count.
  """

  def __init__(
    self,
    *,
    window_secs: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    if window_secs <= 0:
      raise ValueError(f'{window_secs=} must be positive; 30 is the default.')
    self._window_secs = window_secs
    self._clock = clock
    self._paused_secs = 0.0
    self._num_pauses = 0
    self._samples: collections.deque[tuple[float, int, int]] = (
      collections.deque()
    )

  def update(self, step: int, *, num_tokens: int = 0) -> None:
    """Records that `step` is done, with the tokens seen since the start."""
    now = self._clock() - self._paused_secs
    self._samples.append((now, step, num_tokens))
    # At least two samples stay, so that slow steps have a rate too.
    while len(self._samples) > 2 and self._samples[1][0] <= (
      now - self._window_secs
    ):
      self._samples.popleft()

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Leaves the time inside the block out of every rate."""
    start = self._clock()
    self._num_pauses += 1
    try:
      yield
    finally:
      self._num_pauses -= 1
      # Of nested pauses only the outermost counts.
      if self._num_pauses == 0:
        self._paused_secs += self._clock() - start

  @property
  def steps_per_sec(self) -> float | None:
    """The rate over the window; None before two updates."""
    return self._rate(1)

  @property
  def tokens_per_sec(self) -> float | None:
    """The rate over the window; None before two updates."""
    return self._rate(2)

  def remaining_secs(self, total_steps: int) -> float | None:
    """Time until `total_steps` at the present rate; None while unknown."""
    rate = self.steps_per_sec
    if not rate:
      return None
    return max(0, total_steps - self._samples[-1][1]) / rate

  def _rate(self, column: int) -> float | None:
    if len(self._samples) < 2:
      return None
    first, last = self._samples[0], self._samples[-1]
    secs = last[0] - first[0]
    return (last[column] - first[column]) / secs if secs > 0 else None


class Progress:
  """Shows how far a run is: a live bar on a terminal, else plain lines.

  Use it as a context manager. It draws only inside `update` and `message`, so
  it costs no thread; logging lines appear above the bar.

  Args:
    total_steps: The step at which the run is done.
    title: Short name of what runs.
    unit: What `tokens_per_sec` counts.
    start_step: Where a continued run starts.
    stream: Where to draw; standard error by default.
    every_secs: Time between two lines where there is no terminal.
    meter: Gives the remaining time. Pass the loop's own, and update it there,
      so that its pauses count; by default `update` feeds a private one.
    primary: False shows nothing, for all processes but the first.
  """

  def __init__(
    self,
    total_steps: int,
    *,
    title: str,
    unit: str = 'tokens',
    start_step: int = 0,
    stream: TextIO | None = None,
    every_secs: float = 10.0,
    meter: RateMeter | None = None,
    primary: bool = True,
  ):
    if total_steps < 0:
      raise ValueError(f'{total_steps=} must not be negative; set steps >= 0.')
    self._total_steps = total_steps
    self._title, self._unit = title, unit
    self._step = start_step
    self._stream = sys.stderr if stream is None else stream
    self._every_secs = every_secs
    self._meter = RateMeter() if meter is None else meter
    self._feeds_meter = meter is None
    self._primary = primary
    self._fields: Mapping[str, str | float] = {}
    self._drawn_secs = float('-inf')
    self._is_drawn = True
    self._console = rich_console.Console(file=self._stream)
    self._live: rich_live.Live | None = None
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> Self:
    if self._primary and _can_redraw(self._console):
      live = rich_live.Live(
        console=self._console,
        auto_refresh=False,
        get_renderable=self._render,
        # A redirected stdout is the user's file, not a place for the bar.
        redirect_stdout=sys.stdout.isatty(),
      )
      original = sys.stderr
      self._stack.enter_context(live)
      self._stack.enter_context(_logging_through(original, sys.stderr))
      self._live = live
    if self._feeds_meter:
      self._meter.update(self._step)
    return self

  def __exit__(self, *exc_info: object) -> None:
    if not self._is_drawn:
      self._draw()
    self._stack.close()
    self._live = None

  def update(self, step: int, fields: Mapping[str, str | float]) -> None:
    """Says that `step` is done, with figures to show beside it.

    Args:
      step: Steps done since the beginning of the whole run.
      fields: What to show, in this order. The names `tokens_per_sec`, `mfu`
        and `learning_rate` have a format of their own; text is shown as it is.
    """
    self._step = step
    self._fields = fields
    self._is_drawn = False
    if self._feeds_meter:
      self._meter.update(step)
    wait = self._every_secs if self._live is None else _MIN_REFRESH_SECS
    if time.monotonic() - self._drawn_secs >= wait:
      self._draw()

  def message(self, text: str) -> None:
    """Prints `text` on a line of its own, above the bar if there is one."""
    if not self._primary:
      return
    if self._live is None:
      print(text, file=self._stream, flush=True)
    else:
      self._console.print(rich_text.Text(text))

  def _draw(self) -> None:
    self._is_drawn = True
    self._drawn_secs = time.monotonic()
    if not self._primary:
      return
    if self._live is None:
      parts = [f'step {self._step}/{self._total_steps}', *self._field_texts()]
      remaining = self._remaining()
      if remaining:
        parts.append(f'eta {remaining}')
      print(' '.join(parts), file=self._stream, flush=True)
    else:
      self._live.refresh()

  def _render(self) -> rich_console.RenderableType:
    """Builds the bar, and the figures on a row of their own below it."""
    share = (
      min(1.0, self._step / self._total_steps) if self._total_steps else 1.0
    )
    row = rich_table.Table.grid(padding=(0, 2, 0, 0), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    row.add_row(
      rich_text.Text(self._title, style='bold'),
      progress_bar.ProgressBar(total=1.0, completed=share),
      f'{self._step}/{self._total_steps}  {share:.0%}',
    )
    remaining = self._remaining()
    texts = [*self._field_texts(), f'{remaining} left' if remaining else '']
    line = rich_text.Text(' · '.join(filter(None, texts)), style='dim')
    return rich_console.Group(row, line)

  def _field_texts(self) -> list[str]:
    return [
      _field_text(name, value, unit=self._unit)
      for name, value in self._fields.items()
    ]

  def _remaining(self) -> str:
    secs = self._meter.remaining_secs(self._total_steps)
    # Parts of a second would flicker, and mean nothing.
    whole = 0 if secs is None else round(secs)
    return units.format_duration(whole) if whole else ''


def _field_text(name: str, value: str | float, *, unit: str) -> str:
  if isinstance(value, str):
    return f'{name} {value}'
  if name == 'tokens_per_sec':
    return f'{units.format_count(value)} {unit}/s'
  if name == 'mfu':
    return f'{value:.1%} MFU'
  if name == 'learning_rate':
    return f'lr {value:.2g}'
  return f'{name} {value:.4g}'


def _can_redraw(console: rich_console.Console) -> bool:
  if console.is_jupyter:
    # Without it rich only warns, once per refresh.
    return importlib.util.find_spec('ipywidgets') is not None
  return console.is_interactive


@contextlib.contextmanager
def _logging_through(original: TextIO, proxy: TextIO) -> Iterator[None]:
  """Sends logging that holds `original` to `proxy`, which spares the bar."""
  handlers = [absl.logging.get_absl_handler().python_handler]
  handlers += logging.getLogger().handlers
  moved = [
    handler
    for handler in handlers
    if isinstance(handler, logging.StreamHandler) and handler.stream is original
  ]
  for handler in moved:
    handler.setStream(proxy)
  try:
    yield
  finally:
    for handler in moved:
      handler.setStream(original)
