"""A hub and islands as machines of their own on this one, and links between.

Each is a network namespace, reached by a link whose rate `tbf` limits and whose
delay `netem` makes, where the kernel has it. Elsewhere packets go through a TUN
device at each end, and a thread here holds them back. Needs root.

Whatever becomes of the process that made them, the namespaces and all that runs
in them are gone after it: a guard, a process of its own, waits for its end.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import heapq
import json
import os
import pathlib
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

HUB_ADDRESS = '10.77.0.1'
_DEVICE = 'wan'
# Few packets, as a program handles each.
_MTU = 9000
_BURST_BYTES = 2 * _MTU
_QUEUE_BYTES = 1 << 18
_NAMESPACES = pathlib.Path('/run/netns')
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
_PATIENCE_SECS = 30.0


class UnavailableError(RuntimeError):
  """Why there can be no links here, in one line."""


@dataclasses.dataclass(frozen=True)
class Link:
  """Between an island and the hub.

  Attributes:
    bits_per_sec: In each direction.
    round_trip_secs: There and back.
  """

  bits_per_sec: float
  round_trip_secs: float


class Rig(contextlib.AbstractContextManager):
  """A hub and islands, each in a namespace of its own.

  Args:
    num_islands: How many.

  Raises:
    UnavailableError: On entering, if they cannot be made here.
  """

  def __init__(self, num_islands: int):
    self._prefix = f'wan{os.getpid()}-'
    self._hub = f'{self._prefix}hub'
    self._islands = [f'{self._prefix}{i}' for i in range(num_islands)]
    self._has_netem = False
    self._pump: _Pump | None = None
    self._guard: subprocess.Popen[bytes] | None = None

  def __enter__(self) -> 'Rig':
    if os.geteuid() != 0:
      raise UnavailableError('network namespaces need root')
    self._guard = subprocess.Popen(
      [sys.executable, '-m', 'benchmarks.wan_links', self._prefix],
      stdin=subprocess.PIPE,
      start_new_session=True,
    )
    try:
      self._make()
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *error: object) -> None:
    if self._pump is not None:
      self._pump.stop()
    if self._guard is not None and self._guard.stdin is not None:
      self._guard.stdin.close()
      self._guard.wait(_PATIENCE_SECS)

  @property
  def delay(self) -> str:
    """What makes the delay."""
    return 'netem' if self._has_netem else 'user-space TUN link'

  def inside(self, island: int | None, command: Sequence[str]) -> list[str]:
    """A command, as it runs on an island, or with None on the hub."""
    where = self._hub if island is None else self._islands[island]
    return ['ip', 'netns', 'exec', where, *command]

  def set_link(self, island: int, link: Link) -> None:
    """Makes a link what it is from now on."""
    half_secs = link.round_trip_secs / 2
    for where, device in self._ends(island):
      _tc(
        where,
        *('qdisc', 'replace', 'dev', device, 'root', 'handle', '1:', 'tbf'),
        *('rate', f'{link.bits_per_sec:.0f}bit'),
        *('burst', str(_BURST_BYTES), 'limit', str(_QUEUE_BYTES)),
      )
      if self._has_netem:
        _tc(
          where,
          *('qdisc', 'replace', 'dev', device, 'parent', '1:1', 'handle'),
          *('10:', 'netem', 'delay', f'{1e6 * half_secs:.0f}us'),
          *('limit', '50000'),
        )
    if self._pump is not None:
      self._pump.set_delay(island, half_secs)

  def set_up(self, island: int, *, is_up: bool) -> None:
    """Takes a link down at the island's end, or up again."""
    name = self._islands[island]
    _ip(name, 'link', 'set', 'dev', _DEVICE, 'up' if is_up else 'down')

  def num_bytes(self) -> list[tuple[int, int]]:
    """Sent and received by each island so far, by its network interface."""
    found = []
    for name in self._islands:
      text = _ip(name, '-s', '-j', 'link', 'show', 'dev', _DEVICE)
      counts = json.loads(text)[0]['stats64']
      found.append((counts['tx']['bytes'], counts['rx']['bytes']))
    return found

  def _ends(self, island: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """Namespace and device at the island, and at the hub."""
    return (self._islands[island], _DEVICE), (self._hub, f'{_DEVICE}{island}')

  def _make(self) -> None:
    for name in (self._hub, *self._islands):
      _run('ip', 'netns', 'add', name)
      _ip(name, 'link', 'set', 'lo', 'up')
    self._has_netem = self._try_netem()
    if not self._has_netem:
      self._pump = _Pump()
    for i in range(len(self._islands)):
      self._connect(i)
    if self._pump is not None:
      self._pump.start()

  def _try_netem(self) -> bool:
    try:
      _tc(self._hub, 'qdisc', 'replace', 'dev', 'lo', 'root', 'netem')
    except UnavailableError:
      return False
    _tc(self._hub, 'qdisc', 'del', 'dev', 'lo', 'root')
    return True

  def _connect(self, island: int) -> None:
    (here, device), (hub, far_device) = ends = self._ends(island)
    address = f'10.77.0.{island + 2}'
    if self._pump is None:
      _ip(
        here,
        *('link', 'add', device, 'type', 'veth'),
        *('peer', 'name', far_device, 'netns', hub),
      )
    else:
      self._pump.connect(island, *(_open_tun(*end) for end in ends))
    for (where, name), own, other in (
      (ends[0], address, HUB_ADDRESS),
      (ends[1], HUB_ADDRESS, address),
    ):
      _ip(where, 'link', 'set', 'dev', name, 'mtu', str(_MTU))
      # One packet at a time, as a wire carries them.
      _ip(where, 'link', 'set', 'dev', name, 'gso_max_segs', '1')
      _ip(where, 'address', 'add', own, 'peer', other, 'dev', name)
      _ip(where, 'link', 'set', 'dev', name, 'up')


class _Pump(threading.Thread):
  """Carries packets between pairs of TUN devices, each after a delay."""

  def __init__(self) -> None:
    super().__init__(daemon=True)
    self._ways: dict[int, tuple[int, int]] = {}
    self._delays: dict[int, float] = {}
    self._stop_now = threading.Event()

  def connect(self, island: int, near: int, far: int) -> None:
    """Makes a link of two devices."""
    self._ways |= {near: (island, far), far: (island, near)}
    self._delays[island] = 0.0

  def set_delay(self, island: int, secs: float) -> None:
    """Holds packets of a link back for so long, either way."""
    self._delays[island] = secs

  def stop(self) -> None:
    """Carries no more, and closes the devices."""
    self._stop_now.set()
    if self.is_alive():
      self.join()
    for device in self._ways:
      os.close(device)

  def run(self) -> None:
    """Carries packets until it is stopped."""
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while not self._stop_now.is_set():
      left = waiting[0][0] - time.monotonic() if waiting else 0.2
      ready, _, _ = select.select(self._ways, [], [], max(0.0, left))
      for device in ready:
        island, to = self._ways[device]
        with contextlib.suppress(OSError):
          packet = os.read(device, 1 << 16)
          due = time.monotonic() + self._delays[island]
          count += 1
          heapq.heappush(waiting, (due, count, to, packet))
      while waiting and waiting[0][0] <= time.monotonic():
        _, _, to, packet = heapq.heappop(waiting)
        # What comes to a link that is down is lost.
        with contextlib.suppress(OSError):
          os.write(to, packet)


def _open_tun(namespace: str, name: str) -> int:
  """Makes a TUN device in a namespace; gives its end here."""
  library = ctypes.CDLL(None, use_errno=True)
  home = os.open('/proc/thread-self/ns/net', os.O_RDONLY)
  there = os.open(_NAMESPACES / namespace, os.O_RDONLY)
  try:
    if library.setns(there, _CLONE_NEWNET):
      raise UnavailableError(os.strerror(ctypes.get_errno()))
    try:
      device = os.open('/dev/net/tun', os.O_RDWR | os.O_NONBLOCK)
      request = struct.pack('16sH14x', name.encode(), _TUN_WITHOUT_HEADER)
      fcntl.ioctl(device, _TUNSETIFF, request)
    finally:
      library.setns(home, _CLONE_NEWNET)
  except OSError as error:
    raise UnavailableError(
      f'the kernel has neither netem nor TUN devices: {error.strerror or error}'
    ) from error
  finally:
    os.close(home)
    os.close(there)
  return device


def _ip(namespace: str, *arguments: str) -> str:
  return _run('ip', '-n', namespace, *arguments)


def _tc(namespace: str, *arguments: str) -> str:
  return _run('tc', '-n', namespace, *arguments)


def _run(*command: str) -> str:
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
  except FileNotFoundError as error:
    raise UnavailableError(f'{command[0]} (iproute2) is missing') from error
  if done.returncode:
    line = ' '.join(done.stderr.split())
    raise UnavailableError(f'{" ".join(command)}: {line}')
  return done.stdout


def _remove(prefix: str) -> None:
  """Ends what runs in namespaces of this prefix, and removes them."""
  for path in sorted(_NAMESPACES.glob(f'{prefix}*')):
    found = _run('ip', 'netns', 'pids', path.name)
    for pid in found.split():
      with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGKILL)
    _run('ip', 'netns', 'delete', path.name)


def main() -> None:
  """Waits until the rig's process is gone, and clears up."""
  sys.stdin.buffer.read()
  _remove(sys.argv[1])


if __name__ == '__main__':
  main()
