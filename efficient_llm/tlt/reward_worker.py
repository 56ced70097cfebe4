"""Processes in which a reward function runs, from outside and from inside.

`Workers` is the parent's side. `main` and what follows is a worker's own side:
there this file is the program, of the standard library alone, to start at once
and leave the accelerator be. What a function prints does no harm to messages.
"""

import contextlib
import fcntl
import functools
import importlib
import math
import multiprocessing
import operator
import os
import pickle
import reprlib
import signal
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Iterator
from importlib import machinery
from multiprocessing import connection
from typing import Any

# (kind, value): first 'ready', or 'unusable' with a reason; then for each call
# 'scored' with a reward, None or a fault for every row, or 'raised',
# 'miscounted' or, said by the parent, 'lost' with a fault of them all.
Reply = tuple[str, Any]
Event = tuple[Any, Reply]  # (call, reply)

# For the start of a process and the imports of the user's module.
_LOAD_LIMIT_SECS = 120.0


class Workers:
  """Processes that run one function, each for one call at a time.

  One that hangs is ended, with every process of its group, and one that ended
  is replaced. For one thread; `wake` alone is for any.
  """

  def __init__(self, function: str, num_workers: int):
    """Starts the processes, without waiting for them."""
    # As they are now: a replacement must find the same function.
    folder = os.getcwd()
    path = [entry or folder for entry in sys.path]
    self._start = functools.partial(_Worker, function, path, folder)
    self._function = function
    self._woken, self._wake = multiprocessing.Pipe(duplex=False)
    self._workers = [self._start() for _ in range(num_workers)]
    self.are_loaded = False

  @property
  def calls(self) -> list[Any]:
    """The calls that workers are busy with."""
    return [worker.call for worker in self._workers if worker.call]

  def begin(self, call: Any, message: Any, *, timeout_secs: float) -> bool:
    """Gives a call to an idle worker; False if there is none."""
    for worker in self._workers:
      # A send fails if the worker ended while it was idle.
      is_idle = worker.is_loaded and worker.call is None
      if is_idle and worker.send(message):
        worker.call = call
        worker.set_limit(timeout_secs)
        return True
    return False

  def wake(self) -> None:
    """Ends the wait of another thread, or the next one."""
    self._wake.send_bytes(b'.')

  def wait(self) -> Iterator[Event]:
    """Waits for something to happen; yields what became of calls.

    Raises:
      ValueError: If a worker cannot load the function.
    """
    by_connection = {worker.connection: worker for worker in self._workers}
    patience = min(w.deadline for w in self._workers) - time.monotonic()
    # At most an hour: no system call takes an endless time.
    patience = min(max(patience, 0.0), 3600.0)
    ready = connection.wait([self._woken, *by_connection], patience)
    if self._woken in ready:
      self._woken.recv_bytes()
    for worker in by_connection.values():
      # A reply that has come counts, however late it is read.
      if worker.connection in ready or worker.connection.poll():
        reply = worker.receive()
      elif worker.deadline <= time.monotonic():
        worker.kill()
        reply = 'lost', f'was still running after {worker.limit_secs:g} s'
      else:
        continue
      yield from self._handle(worker, reply)

  def close(self) -> None:
    for worker in self._workers:
      worker.kill()

  def _handle(self, worker: '_Worker', reply: Reply) -> Iterator[Event]:
    kind, value = reply
    if kind == 'unusable' or (kind == 'lost' and not worker.is_loaded):
      raise ValueError(
        f'reward.function={self._function!r} cannot be loaded: {value}; write '
        'module:function or path/to/file.py:function of one that can.'
      )
    call = worker.call
    if kind == 'lost':
      self._workers[self._workers.index(worker)] = self._start()
    else:
      self.are_loaded = worker.is_loaded = True
      worker.call = None
      worker.set_limit(math.inf)
    if call:
      yield call, reply


class _Worker:
  """One process; `connection` gives its replies."""

  def __init__(self, function: str, path: list[str], folder: str):
    self.set_limit(_LOAD_LIMIT_SECS)
    self.is_loaded = False
    self.call: Any = None
    self.connection, theirs = multiprocessing.Pipe()
    with theirs:
      # -P: modules beside this file must not hide others. A group of its own:
      # a terminal's Ctrl-C is not sent to it, and it can be ended as a whole.
      self._process = subprocess.Popen(
        [sys.executable, '-P', __file__, f'{theirs.fileno()}'],
        stdin=subprocess.PIPE,
        pass_fds=[theirs.fileno()],
        cwd=folder,
        process_group=0,
      )
    self.send((function, path))

  def set_limit(self, secs: float) -> None:
    self.limit_secs = secs
    self.deadline = time.monotonic() + secs

  def send(self, message: Any) -> bool:
    """Sends a message; False if the process has ended."""
    with contextlib.suppress(OSError):
      self.connection.send(message)
      return True
    return False

  def receive(self) -> Reply:
    """Returns the next reply, 'lost' if the process has ended."""
    try:
      return self.connection.recv()
    except (EOFError, OSError):
      return 'lost', f'ended its process ({self.kill()})'

  def kill(self) -> str:
    """Ends the process and those it started; says how it had ended."""
    # One that ended by itself keeps its number and its exit status until it is
    # waited for, so that this can reach no other process.
    if self._process.returncode is None:
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(self._process.pid, signal.SIGKILL)
      self._process.kill()
    self.connection.close()
    if self._process.stdin:
      self._process.stdin.close()
    status = self._process.wait()
    if status < 0:
      return f'signal {-status}, {signal.strsignal(-status)}'
    return f'exit status {status}'


def main() -> None:
  """Loads the function that the parent names, then scores until it ends."""
  channel = connection.Connection(int(sys.argv[1]))
  os.set_inheritable(channel.fileno(), False)
  # The parent hears of Ctrl-C too, and decides.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  _die_with_the_parent()
  # Standard output belongs to the parent's results.
  os.dup2(2, 1)
  with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
    name, sys.path[:] = channel.recv()
    _serve(channel, name)


def _die_with_the_parent() -> None:
  """Has the kernel end this process group when the parent is gone.

  The parent alone holds the other end of standard input, and never writes to
  it. A thread that waits for it would stand still during a regular expression.
  """
  lifeline = os.dup(0)
  signal.signal(signal.SIGIO, signal.SIG_DFL)
  fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpid())
  flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
  fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)
  with open(os.devnull) as nothing:
    os.dup2(nothing.fileno(), 0)


def _serve(channel: connection.Connection, name: str) -> None:
  try:
    module, function = _load(name)
  except BaseException as error:
    channel.send(('unusable', _one_line(error)))
    return
  if not callable(function):
    kind = type(function).__name__
    channel.send(('unusable', f'it is a {kind}, not a function'))
    return
  channel.send(('ready', None))
  while True:
    channel.send(_score(module, function, *channel.recv()))


def _load(name: str) -> tuple[types.ModuleType, Any]:
  """Imports what 'module:function' or 'file.py:function' names."""
  place, _, attribute = name.rpartition(':')
  find = operator.attrgetter(attribute)
  if not place.endswith('.py'):
    module = importlib.import_module(place)
    return module, find(module)
  place = os.path.abspath(place)
  # Last, so that the files beside it hide no other module.
  sys.path.append(os.path.dirname(place))
  loader = machinery.SourceFileLoader('reward_file', place)
  module = types.ModuleType(loader.name)
  module.__file__ = place
  # Where pickle and dataclasses look for it.
  sys.modules[loader.name] = module
  loader.exec_module(module)
  return module, find(module)


def _score(
  module: types.ModuleType, function: Any, payload: bytes, only: int | None
) -> Reply:
  """Scores a chunk of rows, or one row of it."""
  try:
    columns = pickle.loads(payload)
    if only is not None:
      columns = {
        name: column[only : only + 1] for name, column in columns.items()
      }
    prompts, completions = columns.pop('prompts'), columns.pop('completions')
    num_rows = len(completions)
    rewards = _listed(function(prompts, completions, **columns))
    if not isinstance(rewards, list) or len(rewards) != num_rows:
      kind = type(rewards).__name__
      found = f'{len(rewards)} rewards' if kind == 'list' else f'a {kind}'
      return 'miscounted', f'returned {found}, not a list of {num_rows} rewards'
    return 'scored', [_checked(reward) for reward in rewards]
  # SystemExit too: no exception may pass for a reward.
  except BaseException as error:
    where = _place_in(module, error)
    return 'raised', f'raised {_one_line(error)}{where}'


def _listed(result: Any) -> Any:
  """Makes a list of a tuple or an array, which hold rewards as well."""
  result = list(result) if isinstance(result, tuple) else result
  return result.tolist() if hasattr(result, 'tolist') else result


def _checked(reward: Any) -> float | str | None:
  """Gives the reward as a float, or says what is wrong with it."""
  if reward is None:
    return None
  # A text has no __float__, though float() would read it.
  if not hasattr(reward, '__float__'):
    shown = ' '.join(reprlib.repr(reward).split())
    return f'returned {shown}, which is not a number'
  number = float(reward)
  return number if math.isfinite(number) else f'returned {number}'


def _one_line(error: BaseException) -> str:
  # Cut, as an exception may repeat all of a completion.
  words = ''.join(traceback.format_exception_only(error)).split()
  return ' '.join(words)[:300]


def _place_in(module: types.ModuleType, error: BaseException) -> str:
  """Names the innermost line of the user's file that led to an exception."""
  # The first is the call; with an argument that does not fit, the only one.
  frames = traceback.extract_tb(error.__traceback__)[1:]
  file = getattr(module, '__file__', None)
  own = [frame for frame in frames if frame.filename == file]
  last = [*frames, *own][-1:]
  return ''.join(f' ({frame.filename}, line {frame.lineno})' for frame in last)


if __name__ == '__main__':
  main()
