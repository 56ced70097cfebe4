"""Whether the coordinator of several processes can be reached."""

import errno
import ipaddress
import socket
from collections.abc import Iterator

from experiments import health


def check(
  address: str,
  *,
  process_id: int,
  num_hosts: int | None,
  timeout_secs: float = 5.0,
) -> Iterator[health.Check]:
  """Tries to listen at (process 0) or to reach (the others) the coordinator.

  Args:
    address: HOST:PORT.
    process_id: Number of this process.
    num_hosts: Machines in all; None if not known.
    timeout_secs: How long a connection may take.
  Raises:
    ValueError: If the address is not of this form.
  """
  host, port = parse_address(address)
  try:
    family, kind, _, _, resolved = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM
    )[0]
  except (OSError, UnicodeError):
    yield health.Check(
      'coordinator', 'FAIL', f'{host} has no address here; name it by its IP.'
    )
    return
  if ipaddress.ip_address(resolved[0]).is_loopback:
    message = f'{host} is {resolved[0]}, which every machine is to itself'
    if num_hosts is not None and num_hosts > 1:
      yield health.Check(
        'coordinator',
        'FAIL',
        f"{message}; give process 0's address in the network.",
      )
      return
    if num_hosts is None:
      yield health.Check(
        'coordinator address', 'warn', f'{message}: right on one machine only.'
      )
  with socket.socket(family, kind) as connection:
    connection.settimeout(timeout_secs)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      if process_id == 0:
        connection.bind(resolved)
      else:
        connection.connect(resolved)
    except OSError as error:
      reason = _connection_remedy(error, process_id)
      yield health.Check('coordinator', 'FAIL', f'{address} {reason}.')
      return
  did = 'is free to listen at' if process_id == 0 else 'answers'
  yield health.Check('coordinator', 'ok', f'{address} {did}')


def parse_address(address: str) -> tuple[str, int]:
  """Parts HOST:PORT; an IPv6 host stands in brackets."""
  host, _, port = address.rpartition(':')
  is_port = port.isascii() and port.isdigit() and 0 < int(port) < 2**16
  if not host or not is_port:
    raise ValueError(
      f'--coordinator={address} must be HOST:PORT with a port from 1 to 65535; '
      'for example --coordinator=10.0.0.1:1234.'
    )
  return host.strip('[]'), int(port)


def _connection_remedy(error: OSError, process_id: int) -> str:
  if isinstance(error, TimeoutError):
    return 'does not answer in time; open the port in the firewall'
  if error.errno == errno.EADDRINUSE:
    return 'is taken by another program; choose another port'
  if error.errno == errno.EADDRNOTAVAIL:
    return 'is not an address of this machine; run process 0 on that one'
  if error.errno == errno.ECONNREFUSED:
    return 'refuses the connection; start process 0 first'
  reason = (error.strerror or str(error)).lower()
  which = 'listening' if process_id == 0 else 'the network'
  return f'cannot be used: {reason}; check {which}'
