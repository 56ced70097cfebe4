"""How updates are averaged over a network: around a ring or through a hub."""

import abc
import dataclasses
from typing import Literal

import numpy as np

from efficient_llm.diloco import cities as cities_lib
from efficient_llm.diloco import links


@dataclasses.dataclass(frozen=True)
class Ends:
  """Where islands are attached: number of the city, bit/s out and in."""

  city: np.ndarray
  uplink_bits: np.ndarray
  downlink_bits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Route:
  """What passed between two cities, both ways together.

  Attributes:
    start: One of them.
    end: The other, or the same.
    round_trip_secs: There and back.
    gbits: What its slowest path carries by itself.
    num_bytes: In the whole run.
    busy: Share of the run in which its busiest path was full.
  """

  start: cities_lib.City
  end: cities_lib.City
  round_trip_secs: float
  gbits: float
  num_bytes: float
  busy: float


class Network(abc.ABC):
  """Islands and the paths between them.

  Attributes:
    bytes_sent: By each island in an exchange.
    bytes_received: By each island in an exchange.
    hub_updates: Updates that the busiest hub takes in an exchange; 0 without
      a hub.
  """

  bytes_sent: np.ndarray
  bytes_received: np.ndarray
  hub_updates: int = 0

  @abc.abstractmethod
  def exchange(
    self, ready: np.ndarray, rng: np.random.Generator | None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Averages an update over all islands.

    Args:
      ready: When each island can begin, in seconds.
      rng: Draws delays and losses; None takes the expected ones.

    Returns:
      When each begins to send and when each has the result.
    """

  @abc.abstractmethod
  def routes(self, num_exchanges: int, wall_secs: float) -> tuple[Route, ...]:
    """What passed between cities in so many exchanges."""


def make(
  kind: Literal['ring', 'hub'],
  ends: Ends,
  world: links.Map,
  transport: links.Transport,
  *,
  hub_city: int,
  hub_bits: float,
  num_bytes: float,
) -> Network:
  """Makes a network in which islands average `num_bytes` each."""
  if kind == 'ring':
    return Ring(ends, world, transport, num_bytes=num_bytes)
  return Hub(
    ends,
    world,
    transport,
    city=hub_city,
    bits_per_sec=hub_bits,
    num_bytes=num_bytes,
  )


class Ring(Network):
  """A ring all-reduce: each sends 2 (n - 1) / n of the update to the next.

  It begins when all are ready and goes in 2 (n - 1) hops of an n-th of the
  update, each as long as the slowest link's. Islands of a city are
  neighbours; the order of cities makes the slowest link as fast as can be.
  """

  def __init__(
    self,
    ends: Ends,
    world: links.Map,
    transport: links.Transport,
    *,
    num_bytes: float,
  ):
    self._world, self._transport = world, transport
    size = len(ends.city)
    self._num_hops = 2 * (size - 1)
    self._chunk = num_bytes / size
    cities = np.unique(ends.city)
    rank = np.zeros(len(world.cities), int)
    rank[cities[self._city_order(ends, cities)]] = np.arange(len(cities))
    order = np.argsort(rank[ends.city], kind='stable')
    self._from, self._to = order, np.roll(order, -1)
    self._start, self._end = ends.city[self._from], ends.city[self._to]
    self._paths = world.paths(
      self._start,
      self._end,
      np.minimum(ends.uplink_bits[self._from], ends.downlink_bits[self._to]),
    )
    self.bytes_sent = np.full(size, self._num_hops * self._chunk)
    self.bytes_received = self.bytes_sent

  def exchange(
    self, ready: np.ndarray, rng: np.random.Generator | None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Averages an update over all islands; all end together."""
    begin = np.full_like(ready, ready.max())
    return begin, begin + self._num_hops * float(self._hop_secs(rng).max())

  def routes(self, num_exchanges: int, wall_secs: float) -> tuple[Route, ...]:
    """What passed between cities in so many exchanges."""
    num_bytes = np.full(len(self._from), self._num_hops * self._chunk)
    return _routes(
      self._world,
      self._start,
      self._end,
      self._paths,
      self._transport,
      num_exchanges * num_bytes,
      wall_secs,
    )

  def _hop_secs(self, rng: np.random.Generator | None) -> np.ndarray:
    delay, rate = links.sample(
      self._paths, self._transport, self._num_hops * self._chunk, rng
    )
    return delay + 8 * self._chunk / rate

  def _city_order(self, ends: Ends, cities: np.ndarray) -> list[int]:
    # What a city can send or take at best; which island meets which is open.
    best = np.array([ends.uplink_bits[ends.city == c].max() for c in cities])
    start, end = np.meshgrid(cities, cities, indexing='ij')
    paths = self._world.paths(
      start, end, np.minimum(best[:, None], best[None, :])
    )
    delay, rate = links.sample(paths, self._transport, self._chunk, None)
    return links.ring_order(delay + 8 * self._chunk / rate)


class Hub(Network):
  """A hub: each island sends its update there and takes the average back.

  The hub's link is never idle while something waits for it, and is shared
  out evenly among those who could take more. It sends when it has all.
  """

  def __init__(
    self,
    ends: Ends,
    world: links.Map,
    transport: links.Transport,
    *,
    city: int,
    bits_per_sec: float,
    num_bytes: float,
  ):
    self._world, self._transport = world, transport
    self._bits, self._num_bytes = bits_per_sec, num_bytes
    self._city = ends.city
    self._hub = np.full_like(ends.city, city)
    self._up, self._down = (
      world.paths(ends.city, self._hub, np.minimum(cap, bits_per_sec))
      for cap in (ends.uplink_bits, ends.downlink_bits)
    )
    self.bytes_sent = np.full(len(ends.city), num_bytes)
    self.bytes_received = self.bytes_sent
    self.hub_updates = len(ends.city)

  def exchange(
    self, ready: np.ndarray, rng: np.random.Generator | None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Averages an update over all islands; near ones have it sooner."""
    return ready, self.give(self.collect(ready, rng), rng)

  def collect(
    self, ready: np.ndarray, rng: np.random.Generator | None
  ) -> float:
    """When the hub has all updates, in seconds; arguments as of `exchange`."""
    bits = 8 * self._num_bytes
    delay, rate = links.sample(self._up, self._transport, self._num_bytes, rng)
    alone = (ready + delay + bits / rate).max()
    # From each start on, the hub has those who began then or later to serve.
    behind = bits / self._bits * np.arange(len(ready), 0, -1)
    return max(alone, (np.sort(ready) + behind).max())

  def give(self, start: float, rng: np.random.Generator | None) -> np.ndarray:
    """When each island has the average, in seconds.

    Args:
      start: When the hub begins to send it.
      rng: Draws delays and losses; None takes the expected ones.
    """
    delay, rate = links.sample(
      self._down, self._transport, self._num_bytes, rng
    )
    bits = 8 * self._num_bytes
    return start + delay + bits / fair_rates(rate, self._bits)

  def routes(self, num_exchanges: int, wall_secs: float) -> tuple[Route, ...]:
    """What passed between cities in so many exchanges."""
    return _routes(
      self._world,
      self._city,
      self._hub,
      self._up,
      self._transport,
      np.full(len(self._city), 2.0 * num_exchanges * self._num_bytes),
      wall_secs,
      num_ways=2,
    )


def fair_rates(wanted: np.ndarray, total: float) -> np.ndarray:
  """Shares a link out evenly, none getting more than it wants (max-min)."""
  if wanted.sum() <= total:
    return wanted
  ordered = np.sort(wanted)
  left = len(ordered) - np.arange(len(ordered))
  level = (total - (np.cumsum(ordered) - ordered)) / left
  # The first who wants more than an even part of what is left sets the level.
  return np.minimum(wanted, level[np.argmax(ordered >= level)])


def _routes(
  world: links.Map,
  start: np.ndarray,
  end: np.ndarray,
  paths: links.Paths,
  transport: links.Transport,
  num_bytes: np.ndarray,
  wall_secs: float,
  *,
  num_ways: int = 1,
) -> tuple[Route, ...]:
  """Adds paths up by pair of cities."""
  _, rate = links.sample(paths, transport, float(num_bytes.max()), None)
  busy = 8 * num_bytes / num_ways / rate / wall_secs
  pairs = np.stack([np.minimum(start, end), np.maximum(start, end)], axis=1)
  unique, inverse = np.unique(pairs, axis=0, return_inverse=True)
  inverse = inverse.reshape(-1)
  return tuple(
    Route(
      start=world.cities[a],
      end=world.cities[b],
      round_trip_secs=float(paths.round_trip_secs[inverse == i].max()),
      gbits=float(rate[inverse == i].min() / 1e9),
      num_bytes=float(num_bytes[inverse == i].sum()),
      busy=float(busy[inverse == i].max()),
    )
    for i, (a, b) in enumerate(unique)
  )
