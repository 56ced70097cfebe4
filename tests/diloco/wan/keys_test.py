import contextlib
import pathlib
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from experiments import hub_link

_REASON = 'needs the extra [wan]'
pytest.importorskip('flwr', reason=_REASON)
keys: Any = pytest.importorskip('efficient_llm.diloco.wan.keys', reason=_REASON)


@contextlib.contextmanager
def _server(context: ssl.SSLContext | None) -> Iterator[int]:
  """Listens as a hub would; without a context it speaks in plain text."""
  with socket.create_server(('127.0.0.1', 0)) as server:

    def serve() -> None:
      with contextlib.suppress(OSError):
        while True:
          connection, _ = server.accept()
          with contextlib.suppress(OSError), connection:
            if context is None:
              connection.sendall(b'HTTP/1.1 400 Bad Request\r\n\r\n')
            else:
              context.wrap_socket(connection, server_side=True).close()

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)


def _context(folder: pathlib.Path) -> ssl.SSLContext:
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
  context.load_cert_chain(folder / keys.CERTIFICATE, folder / keys.HUB_KEY)
  return context


def _target(folder: pathlib.Path, port: int) -> hub_link.Target:
  return hub_link.Target.from_flags(
    hub=f'127.0.0.1:{port}',
    key=str(folder / 'islands' / 'a.key'),
    authority=None,
  )


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  keys.make(tmp_path / 'keys', hosts=['hub.example.org'], islands=['a'])
  return tmp_path / 'keys'


def test_an_island_knows_its_hub(folder: pathlib.Path) -> None:
  keys.check_hub(folder)
  with _server(_context(folder)) as port:
    _target(folder, port).check()


def test_a_certificate_out_of_date_is_refused_in_one_line(
  folder: pathlib.Path,
) -> None:
  keys.make(folder, hosts=[], islands=[], days=-1)
  with pytest.raises(ValueError, match='out of date since'):
    keys.check_hub(folder)
  with (
    _server(_context(folder)) as port,
    pytest.raises(ValueError, match='certificate has expired') as error,
  ):
    _target(folder, port).check()
  assert '\n' not in str(error.value)


def test_another_authoritys_hub_is_refused(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  keys.make(tmp_path / 'other', hosts=[], islands=[])
  with (
    _server(_context(tmp_path / 'other')) as port,
    pytest.raises(ValueError, match='is refused: '),
  ):
    _target(folder, port).check()


def test_plain_text_is_refused(folder: pathlib.Path) -> None:
  with (
    _server(None) as port,
    pytest.raises(ValueError, match='does not speak TLS'),
  ):
    _target(folder, port).check()


def test_a_hub_that_is_away_may_come(folder: pathlib.Path) -> None:
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
  _target(folder, port).check()


def test_keys_that_are_there_stay(folder: pathlib.Path) -> None:
  before = (folder / 'islands' / 'a.key').read_bytes()
  made = keys.make(folder, hosts=[], islands=['a', 'b'])
  assert made == [folder / 'islands' / 'b.key']
  assert (folder / 'islands' / 'a.key').read_bytes() == before
  assert list(keys.allowed(folder)) == ['a', 'b']


def test_private_keys_are_only_for_their_user(folder: pathlib.Path) -> None:
  private = [*folder.glob('*.key'), *folder.glob('islands/*.key')]
  assert len(private) == 3
  assert not any(path.stat().st_mode & 0o077 for path in private)


def test_a_name_that_is_a_path_is_refused(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match='lower case letters'):
    keys.make(tmp_path, hosts=[], islands=['../a'])
