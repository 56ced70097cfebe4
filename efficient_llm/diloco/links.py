"""What a path through the internet carries."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from efficient_llm.diloco import cities as cities_lib

_SEGMENT_BYTES = 1460
# sqrt(3/2): loss at random and an acknowledgement for every packet.
_MATHIS = math.sqrt(1.5)
_MAX_EXACT = 8


@dataclasses.dataclass(frozen=True)
class Transport:
  """How bytes are sent.

  Attributes:
    streams: Connections in parallel on a path.
    window_mib: Bytes in flight of one connection at most, in MiB.
    loss: Share of packets lost on a path within a region.
    ocean_loss: The same between regions.
    jitter: Standard deviation of the logarithm of a round trip, from one
      exchange to the next.
  """

  streams: int = 8
  window_mib: float = 16.0
  loss: float = 1e-6
  ocean_loss: float = 5e-6
  jitter: float = 0.1

  def validate(self) -> None:
    for name in ('loss', 'ocean_loss'):
      value = getattr(self, name)
      if not 0 <= value < 1:
        raise ValueError(
          f'transport.{name}={value} must be at least 0 and below 1; 1e-6 is '
          'one packet in a million.'
        )
    if self.streams < 1 or self.window_mib <= 0 or self.jitter < 0:
      raise ValueError(
        f'transport.streams={self.streams} must be at least 1, '
        f'window_mib={self.window_mib} above 0 and jitter={self.jitter} not '
        'negative; change what is not.'
      )


@dataclasses.dataclass(frozen=True)
class Link:
  """What is known of the path between two cities; None is worked out.

  Attributes:
    cities: The two.
    gbits: Gbit/s that it never exceeds.
    round_trip_ms: Milliseconds there and back.
    loss: Share of packets lost.
  """

  cities: tuple[str, ...]
  gbits: float | None = None
  round_trip_ms: float | None = None
  loss: float | None = None

  def validate(self) -> None:
    if len(self.cities) != 2:
      raise ValueError(
        f'links: {self.cities=} must be two cities; write one Link a pair.'
      )
    for name in ('gbits', 'round_trip_ms'):
      value = getattr(self, name)
      if value is not None and value <= 0:
        raise ValueError(
          f'links: {name}={value} of {self.cities} must be above 0; or None.'
        )
    if self.loss is not None and not 0 <= self.loss < 1:
      raise ValueError(
        f'links: loss={self.loss} of {self.cities} must be in [0, 1).'
      )


@dataclasses.dataclass(frozen=True)
class Paths:
  """Some paths, an entry of each array for each.

  Attributes:
    round_trip_secs: There and back.
    loss: Share of packets lost.
    cap_bits: Bit/s that none exceeds: of the link and of both ends.
  """

  round_trip_secs: np.ndarray
  loss: np.ndarray
  cap_bits: np.ndarray


def stream_bits(
  round_trip_secs: np.ndarray, loss: np.ndarray, *, window_bytes: float
) -> np.ndarray:
  """Bit/s of one TCP connection that is never short of data.

  The smaller of window / RTT and the loss bound MSS / RTT * sqrt(3/2) /
  sqrt(loss). Holds for Reno and is near for CUBIC at these delays; BBR is
  faster on a path that loses packets at random.

  Source: Mathis et al. 1997, The macroscopic behavior of the TCP congestion
  avoidance algorithm, eq. 3.
  """
  with np.errstate(divide='ignore'):
    bound = _SEGMENT_BYTES * _MATHIS / np.sqrt(loss)
  return 8 * np.minimum(window_bytes, bound) / round_trip_secs


def sample(
  paths: Paths,
  transport: Transport,
  num_bytes: float,
  rng: np.random.Generator | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Draws how each path serves one transfer.

  Args:
    paths: The paths.
    transport: The connections.
    num_bytes: Of the transfer, which says how many packets may be lost.
    rng: None gives the expected delay and loss.

  Returns:
    Seconds one way, and bit/s.
  """
  trip, loss = paths.round_trip_secs, paths.loss
  if rng is not None:
    trip = trip * np.exp(transport.jitter * rng.standard_normal(trip.shape))
    packets = max(1.0, num_bytes / _SEGMENT_BYTES)
    loss = rng.poisson(loss * packets) / packets
  one = stream_bits(trip, loss, window_bytes=transport.window_mib * 2**20)
  return trip / 2, np.minimum(paths.cap_bits, transport.streams * one)


class Map:
  """Round trips, losses and caps between some cities."""

  def __init__(
    self,
    cities: Sequence[cities_lib.City],
    transport: Transport,
    links: Sequence[Link] = (),
  ):
    self.cities = tuple(cities)
    size = len(self.cities)
    self._trip, self._loss = np.zeros((size, size)), np.zeros((size, size))
    self._cap = np.full((size, size), np.inf)
    for (i, a), (j, b) in itertools.product(enumerate(self.cities), repeat=2):
      self._trip[i, j] = cities_lib.round_trip_secs(a, b)
      is_near = a.region == b.region
      self._loss[i, j] = transport.loss if is_near else transport.ocean_loss
    for link in links:
      self._apply(link)

  def paths(
    self, start: np.ndarray, end: np.ndarray, cap_bits: np.ndarray
  ) -> Paths:
    """Paths between cities given by number, of ends with these caps."""
    return Paths(
      self._trip[start, end],
      self._loss[start, end],
      np.minimum(cap_bits, self._cap[start, end]),
    )

  def _apply(self, link: Link) -> None:
    places = [cities_lib.find(name) for name in link.cities]
    if not all(place in self.cities for place in places):
      raise ValueError(
        f'links: {link.cities} must both have islands or the hub; remove this '
        'link or add the city.'
      )
    i, j = (self.cities.index(place) for place in places)
    for array, value in (
      (self._trip, link.round_trip_ms and link.round_trip_ms / 1e3),
      (self._loss, link.loss),
      (self._cap, link.gbits and link.gbits * 1e9),
    ):
      if value is not None:
        array[i, j] = array[j, i] = value


def ring_order(secs: np.ndarray) -> list[int]:
  """Orders places in a ring whose slowest link is as fast as can be.

  Exact up to eight places, by trying all orders; beyond that the best of
  nearest-neighbour tours improved by reversing stretches.

  Args:
    secs: Cost of each link, symmetric.

  Returns:
    The places in order; among equals the ring of the least sum.
  """
  size = len(secs)

  def cost(order: Sequence[int]) -> tuple[float, float]:
    hops = [
      secs[a, b] for a, b in zip(order, [*order[1:], order[0]], strict=True)
    ]
    return max(hops), sum(hops)

  if size <= _MAX_EXACT:
    rest = itertools.permutations(range(1, size))
    return min(([0, *order] for order in rest), key=cost)
  tours = [_improved(_nearest_tour(secs, start), cost) for start in range(size)]
  return min(tours, key=cost)


def _nearest_tour(secs: np.ndarray, start: int) -> list[int]:
  order, left = [start], set(range(len(secs))) - {start}
  while left:
    order.append(min(left, key=lambda place: secs[order[-1], place]))
    left.remove(order[-1])
  return order


def _improved(
  order: list[int], cost: Callable[[Sequence[int]], tuple[float, float]]
) -> list[int]:
  best = cost(order)
  improves = True
  while improves:
    improves = False
    for i, j in itertools.combinations(range(1, len(order) + 1), 2):
      other = [*order[:i], *reversed(order[i:j]), *order[j:]]
      if cost(other) < best:
        order, best, improves = other, cost(other), True
  return order
