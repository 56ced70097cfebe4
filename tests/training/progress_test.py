import contextlib
import io
import logging
import re
import sys
import time

import absl.logging
import pytest

from efficient_llm.training import progress


class _Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class _Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock():
  return _Clock()


@pytest.fixture
def terminal(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '80')
  for name in ('NO_COLOR', 'FORCE_COLOR', 'TTY_INTERACTIVE', 'CI'):
    monkeypatch.delenv(name, raising=False)
  return _Terminal()


@contextlib.contextmanager
def _shown_on(terminal, total_steps):
  with (
    contextlib.redirect_stderr(terminal),
    progress.Progress(total_steps, title='train') as shown,
  ):
    yield shown


def _screen(text):
  """Plays the control codes of a bar and returns the lines then visible."""
  lines, row = [''], 0
  codes = re.split(r'(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)', text)
  for code in codes:
    if code == '\n':
      row += 1
      lines += [''] * (row + 1 - len(lines))
    elif code == '\x1b[2K':
      lines[row] = ''
    elif match := re.fullmatch(r'\x1b\[(\d*)A', code):
      row -= int(match[1] or 1)
    elif not code.startswith('\x1b') and code != '\r':
      lines[row] += code
  return [line.rstrip() for line in lines]


def test_the_rate_is_that_of_the_last_window(clock):
  meter = progress.RateMeter(window_secs=10, clock=clock)
  for step in range(100):
    clock.now += 5.0 if step < 50 else 0.5
    meter.update(step, num_tokens=64 * step)
  assert meter.steps_per_sec == pytest.approx(2.0)
  assert meter.tokens_per_sec == pytest.approx(128.0)


def test_steps_longer_than_the_window_have_a_rate_too(clock):
  meter = progress.RateMeter(window_secs=1, clock=clock)
  for step in range(3):
    clock.now += 60.0
    meter.update(step)
  assert meter.steps_per_sec == pytest.approx(1 / 60)


def test_paused_time_counts_in_no_rate(clock):
  meter = progress.RateMeter(clock=clock)
  for step in range(10):
    with meter.pause():
      clock.now += 7.0
      with meter.pause():
        clock.now += 3.0
    clock.now += 0.25
    meter.update(step)
  assert meter.steps_per_sec == pytest.approx(4.0)


def test_a_pause_that_ends_in_an_error_ends(clock):
  meter = progress.RateMeter(clock=clock)
  meter.update(0)
  with pytest.raises(KeyError), meter.pause():
    raise KeyError
  clock.now += 2.0
  meter.update(1)
  assert meter.steps_per_sec == pytest.approx(0.5)


def test_the_remaining_time_is_unknown_before_there_is_a_rate(clock):
  meter = progress.RateMeter(clock=clock)
  assert meter.remaining_secs(10) is None
  meter.update(0)
  assert meter.remaining_secs(10) is None
  clock.now += 2.0
  meter.update(1)
  assert meter.remaining_secs(10) == pytest.approx(18.0)


def test_a_batch_log_has_one_plain_line_at_the_first_and_the_last_step():
  stream = io.StringIO()
  with progress.Progress(200, title='train', stream=stream) as shown:
    for step in range(1, 201):
      shown.update(step, {'loss': 1 / step})
  first, last = stream.getvalue().splitlines()
  assert first.startswith('step 1/200 loss 1')
  assert last == 'step 200/200 loss 0.005'


def test_a_batch_line_says_all_that_is_known(clock):
  stream = io.StringIO()
  meter = progress.RateMeter(clock=clock)
  with progress.Progress(
    1000, title='train', stream=stream, meter=meter
  ) as shown:
    meter.update(299)
    clock.now += 0.1143
    meter.update(300)
    fields = {
      'loss': 2.3104,
      'tokens_per_sec': 12345.0,
      'mfu': 0.414,
      'learning_rate': 3e-4,
      'phase': 'warm-up',
    }
    shown.update(300, fields)
  assert stream.getvalue() == (
    'step 300/1000 loss 2.31 12.3k tokens/s 41.4% MFU lr 0.0003 phase warm-up '
    'eta 1m20s\n'
  )


def test_what_is_counted_has_the_name_it_is_given():
  stream = io.StringIO()
  with progress.Progress(2, title='t', unit='images', stream=stream) as shown:
    shown.update(1, {'tokens_per_sec': 950.0})
  assert '950 images/s' in stream.getvalue()


def test_a_batch_log_is_silent_between_its_lines():
  stream = io.StringIO()
  with progress.Progress(9, title='t', stream=stream, every_secs=0.05) as shown:
    shown.update(1, {})
    shown.update(2, {})
    time.sleep(0.06)
    shown.update(3, {})
    shown.update(4, {})
  steps = re.findall(r'step (\d)/9', stream.getvalue())
  assert steps == ['1', '3', '4']


def test_a_batch_log_has_no_control_codes():
  stream = io.StringIO()
  with progress.Progress(1, title='t', stream=stream) as shown:
    shown.message('[bold]saved[/bold]')
    shown.update(1, {})
  assert '\x1b' not in stream.getvalue()
  assert '[bold]saved[/bold]\n' in stream.getvalue()


def test_a_terminal_shows_one_bar_that_is_drawn_over(terminal):
  with _shown_on(terminal, 100) as shown:
    for step in (10, 40):
      shown.update(step, {'loss': 2.5})
      shown.message(f'[saved] {step}')
  lines = [line for line in _screen(terminal.getvalue()) if line]
  assert lines[:2] == ['[saved] 10', '[saved] 40']
  assert lines[2].startswith('train')
  assert lines[2].endswith('40/100  40%')
  assert lines[3].startswith('loss 2.5')
  assert len(lines) == 4


def test_logging_lines_stand_whole_above_the_bar(terminal):
  absl_handler = absl.logging.get_absl_handler().python_handler
  plain_handler = logging.StreamHandler(terminal)
  logging.getLogger().addHandler(plain_handler)
  absl_handler.setStream(terminal)
  try:
    with _shown_on(terminal, 4) as shown:
      shown.update(1, {'loss': 2.5})
      absl_handler.stream.write('from absl\n')
      logging.getLogger().warning('from logging')
      shown.update(2, {'loss': 2.25})
    assert absl_handler.stream is terminal
    assert plain_handler.stream is terminal
  finally:
    logging.getLogger().removeHandler(plain_handler)
    absl_handler.setStream(sys.__stderr__)
  lines = [line for line in _screen(terminal.getvalue()) if line]
  assert lines[:2] == ['from absl', 'from logging']
  assert [line.startswith('train') for line in lines[2:]] == [True, False]


def test_the_bar_is_drawn_at_most_four_times_a_second(terminal):
  start = time.monotonic()
  with _shown_on(terminal, 10**6) as shown:
    for step in range(2000):
      shown.update(step, {})
  secs = time.monotonic() - start
  # One more for the first update and one for the end.
  assert terminal.getvalue().count('train') <= 4 * secs + 3


def test_what_was_there_before_comes_back_after_an_error(terminal):
  with contextlib.redirect_stderr(terminal):
    with (
      pytest.raises(KeyboardInterrupt),
      progress.Progress(10, title='train') as shown,
    ):
      assert sys.stderr is not terminal
      shown.update(1, {})
      raise KeyboardInterrupt
    assert sys.stderr is terminal
  # The cursor, hidden while the bar is live, is shown again.
  codes = re.findall(r'\x1b\[\?25[hl]', terminal.getvalue())
  assert codes[-1] == '\x1b[?25h'


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
  monkeypatch.setenv('TERM', 'dumb')
  with _shown_on(terminal, 2) as shown:
    shown.update(2, {'loss': 1.5})
  assert terminal.getvalue() == 'step 2/2 loss 1.5\n'


def test_processes_that_are_not_first_show_nothing():
  stream = io.StringIO()
  with progress.Progress(1, title='t', stream=stream, primary=False) as shown:
    shown.update(1, {})
    shown.message('saved')
  assert stream.getvalue() == ''


def test_a_run_of_no_steps_is_whole(terminal):
  with _shown_on(terminal, 0) as shown:
    shown.update(0, {})
  assert '0/0  100%' in terminal.getvalue()


def test_a_negative_number_of_steps_is_refused():
  with pytest.raises(ValueError, match='total_steps=-1 must not be negative'):
    progress.Progress(-1, title='t')
