"""From the program that talks to the hub to the one that trains, and back.

A short-lived program hands a message over a Unix socket to the resident one
and gets one message back. It loads nothing heavy, as it starts for every
message.
"""

import contextlib
import os
import pathlib
import queue
import socket
import threading
from collections.abc import Callable

_LENGTH_BYTES = 8
_MAX_BYTES = 1 << 38
# The longest path a Unix socket takes on every system.
_LONGEST_PATH = 100
_LAST_WORD_SECS = 5.0


def ask(path: str | os.PathLike[str], frame: bytes, *, secs: float) -> bytes:
  """Hands a message over and waits for the answer.

  Args:
    path: Of the socket.
    frame: The message.
    secs: How long anything may take.

  Raises:
    OSError: If nobody is there, or does not answer.
  """
  with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
    connection.settimeout(secs)
    connection.connect(os.fspath(path))
    _send(connection, frame)
    return _receive(connection)


class LocalLink(contextlib.AbstractContextManager):
  """The resident program's end: one message at a time, each answered once.

  Args:
    path: Of the socket, only for this user.
    poll_secs: After so long a message is answered by `idle`.
    idle: Says that there is nothing to say yet; called from another thread.
  """

  def __init__(
    self,
    path: pathlib.Path,
    *,
    poll_secs: float,
    idle: Callable[[], bytes | None],
  ):
    if len(os.fspath(path)) > _LONGEST_PATH:
      raise ValueError(
        f'{path} must have at most {_LONGEST_PATH} characters to be a socket; '
        'choose a shorter --workdir.'
      )
    self._path, self._poll_secs, self._idle = path, poll_secs, idle
    self._inbox: queue.Queue[bytes] = queue.Queue()
    self._failure: Exception | None = None
    self._outbox: queue.Queue[bytes] = queue.Queue()
    self._lock = threading.Lock()
    self._is_open = self._is_claimed = False
    self._is_quiet = threading.Event()
    self._is_quiet.set()
    self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

  def __enter__(self) -> 'LocalLink':
    self._path.unlink(missing_ok=True)
    old = os.umask(0o077)
    try:
      self._socket.bind(os.fspath(self._path))
    finally:
      os.umask(old)
    self._socket.listen()
    threading.Thread(target=self._serve, daemon=True).start()
    return self

  def __exit__(self, *error: object) -> None:
    # What was answered last is on its way.
    self._is_quiet.wait(_LAST_WORD_SECS)
    self._socket.close()
    self._path.unlink(missing_ok=True)

  @property
  def path(self) -> pathlib.Path:
    """Of the socket."""
    return self._path

  def break_off(self, error: Exception) -> None:
    """There will be no more messages; `poll` says why."""
    self._failure = error

  def poll(self, secs: float = 0.0) -> bytes | None:
    """The next message, if there is one within this time.

    Raises:
      Exception: What the link was broken off with.
    """
    if self._failure is not None:
      raise self._failure
    try:
      return self._inbox.get(block=secs > 0, timeout=secs or None)
    except queue.Empty:
      return None

  def claim(self) -> bool:
    """Whether a message was read and is unanswered: kept for `answer`."""
    with self._lock:
      self._is_claimed = self._is_open and self._inbox.empty()
      return self._is_claimed

  def answer(self, frame: bytes) -> None:
    """Answers the message that was claimed.

    Raises:
      RuntimeError: If none was: it would answer the next one.
    """
    with self._lock:
      if not self._is_claimed:
        raise RuntimeError('no message is claimed')
      self._is_open = self._is_claimed = False
      self._outbox.put(frame)

  def _serve(self) -> None:
    while True:
      try:
        connection, _ = self._socket.accept()
      except OSError:
        return
      with connection, contextlib.suppress(OSError):
        # One that breaks off in the middle is as if it had not come.
        connection.settimeout(self._poll_secs)
        frame = _receive(connection)
        connection.settimeout(None)
        self._is_quiet.clear()
        try:
          _send(connection, self._answered(frame))
        finally:
          self._is_quiet.set()

  def _answered(self, frame: bytes) -> bytes:
    with self._lock:
      self._is_open, self._is_claimed = True, False
      self._inbox.put(frame)
    while True:
      try:
        return self._outbox.get(timeout=self._poll_secs)
      except queue.Empty:
        with self._lock:
          is_taken = self._is_claimed or not self._is_open
          if is_taken or not self._inbox.empty():
            continue
          if (answer := self._idle()) is not None:
            self._is_open = False
            return answer


def _send(connection: socket.socket, frame: bytes) -> None:
  connection.sendall(len(frame).to_bytes(_LENGTH_BYTES, 'little'))
  connection.sendall(frame)


def _receive(connection: socket.socket) -> bytes:
  size = int.from_bytes(_exactly(connection, _LENGTH_BYTES), 'little')
  if size > _MAX_BYTES:
    raise OSError(f'a message of {size} bytes is too long')
  return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
  parts, missing = [], size
  while missing:
    part = connection.recv(min(missing, 1 << 20))
    if not part:
      raise OSError('the other side closed the connection')
    parts.append(part)
    missing -= len(part)
  return b''.join(parts)
