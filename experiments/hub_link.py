"""An island's connection to its hub: checked, kept up, or given up."""

import contextlib
import dataclasses
import pathlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Sequence

from absl import logging

from efficient_llm.diloco.wan import local_link, status_page
from efficient_llm.diloco.wan.config import RoundConfig
from experiments import flower_programs

_CONNECT_SECS = 10.0
_RETRY_SECS = 2.0
# Flower takes an island that fell silent for present for 60 s.
_UNKNOWN_SECS = 90.0
_NOT_LET_IN = b'Failed to activate SuperNode'


@dataclasses.dataclass(frozen=True)
class Target:
  """Whom an island calls, and how both know each other.

  Attributes:
    hub: HOST:PORT.
    key: The island's private key.
    authority: Certificate that vouches for the hub's.
  """

  hub: str
  key: pathlib.Path
  authority: pathlib.Path

  @classmethod
  def from_flags(
    cls, *, hub: str | None, key: str | None, authority: str | None
  ) -> 'Target':
    """What flags say.

    Raises:
      ValueError: If one is missing or no file.
    """
    if not hub:
      raise ValueError('--hub is missing; give HOST:PORT of the hub.')
    status_page.parse_address(hub)
    if not key:
      raise ValueError(
        '--key is missing; experiments.island_keys makes it at the hub.'
      )
    key_path = pathlib.Path(key).absolute()
    path = key_path.parent / 'authority.pem'
    if authority:
      path = pathlib.Path(authority).absolute()
    elif not path.is_file():
      path = key_path.parent.parent / 'authority.pem'
    for flag, file in (('key', key_path), ('authority', path)):
      if not file.is_file():
        raise ValueError(f'--{flag}={file} must be a file of the hub.')
    return cls(hub, key_path, path)

  def check(self) -> None:
    """Looks whether the hub is who it should be; one that is away may come.

    Raises:
      ValueError: If it is not, or speaks in plain text.
    """
    from efficient_llm.diloco.wan import keys

    context = keys.client_context(self.authority)
    host, port = status_page.parse_address(self.hub)
    try:
      with (
        socket.create_connection((host, port), _CONNECT_SECS) as plain,
        context.wrap_socket(plain, server_hostname=host),
      ):
        pass
    except ssl.SSLCertVerificationError as error:
      raise ValueError(
        f'the certificate of --hub={self.hub} is refused: '
        f'{error.verify_message}; make it anew by experiments.island_keys, or '
        'bring the authority.pem of this hub.'
      ) from error
    except ssl.SSLError as error:
      raise ValueError(
        f'--hub={self.hub} does not speak TLS ({error.reason}); nothing is '
        'sent in plain text.'
      ) from error
    except OSError as error:
      logging.info('The hub is not there yet: %s', error)


class Keeper(contextlib.AbstractContextManager):
  """Keeps Flower's SuperNode up beside the trainer.

  Args:
    target: Whom it calls.
    link: To the trainer; told if the hub does not let the island in.
    workdir: For its log and files.
    rounds: How long an exchange may take.
  """

  def __init__(
    self,
    target: Target,
    link: local_link.LocalLink,
    *,
    workdir: pathlib.Path,
    rounds: RoundConfig,
  ):
    self._target, self._link = target, link
    self._log, self._home = workdir / 'flower.log', workdir / 'flower'
    self._secs = 2 * rounds.poll_secs + rounds.patience_secs
    self._ask_secs = rounds.ask_secs
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._keep, daemon=True)

  def __enter__(self) -> 'Keeper':
    self._thread.start()
    return self

  def __exit__(self, *error: object) -> None:
    self._stop.set()
    self._thread.join(20)

  def _keep(self) -> None:
    refused_since: float | None = None
    while not self._stop.is_set():
      try:
        self._target.check()
      except ValueError as error:
        self._link.break_off(error)
        return
      place = self._log.stat().st_size if self._log.exists() else 0
      began = time.monotonic()
      process = flower_programs.start(
        self._arguments(), home=self._home, log=self._log
      )
      self._wait(process)
      if not self._was_refused(place):
        refused_since = None
      elif refused_since is None:
        refused_since = began
      elif time.monotonic() - refused_since > _UNKNOWN_SECS:
        self._link.break_off(
          ValueError(
            f'--hub={self._target.hub} does not let --key={self._target.key} '
            'in: its .pub is not among the keys of the hub, or another island '
            'uses it.'
          )
        )
        return
      self._stop.wait(_RETRY_SECS)

  def _wait(self, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and not self._stop.wait(0.2):
      pass
    flower_programs.stop(process)

  def _was_refused(self, place: int) -> bool:
    with self._log.open('rb') as file:
      file.seek(place)
      return _NOT_LET_IN in file.read()

  def _arguments(self) -> Sequence[str]:
    port = flower_programs.free_port()
    return [
      'supernode',
      f'127.0.0.1:{port}',
      str(self._ask_secs),
      f'--superlink={self._target.hub}',
      f'--root-certificates={self._target.authority}',
      f'--auth-supernode-private-key={self._target.key}',
      '--host=127.0.0.1',
      f'--port={port}',
      f'--node-config=socket="{self._link.path}" secs={self._secs}',
    ]
