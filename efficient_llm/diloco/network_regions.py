"""A hub in every region, and one for the hubs."""

import numpy as np

from efficient_llm.diloco import links, network_exchange


class RegionalHubs(network_exchange.Network):
  """Islands average through their region's hub, and hubs through one above.

  A region's hub stands where most of its islands are. What it sends on is one
  update, however many it merged.

  Args:
    ends: Of the islands.
    world: Paths between cities.
    transport: How they are used.
    city: Of the hub above.
    bits_per_sec: Of every hub, in each direction.
    num_bytes: Of an update.
  """

  def __init__(
    self,
    ends: network_exchange.Ends,
    world: links.Map,
    transport: links.Transport,
    *,
    city: int,
    bits_per_sec: float,
    num_bytes: float,
  ):
    regions = [world.cities[i].region for i in ends.city]
    self._members = [
      np.flatnonzero([region == name for region in regions])
      for name in sorted(set(regions))
    ]
    homes = np.array(
      [np.bincount(ends.city[m]).argmax() for m in self._members]
    )

    def hub(ends: network_exchange.Ends, city: int) -> network_exchange.Hub:
      return network_exchange.Hub(
        ends,
        world,
        transport,
        city=city,
        bits_per_sec=bits_per_sec,
        num_bytes=num_bytes,
      )

    self._regional = [
      hub(
        network_exchange.Ends(
          ends.city[m], ends.uplink_bits[m], ends.downlink_bits[m]
        ),
        home,
      )
      for m, home in zip(self._members, homes, strict=True)
    ]
    widths = np.full(len(homes), bits_per_sec)
    self._above = hub(network_exchange.Ends(homes, widths, widths), city)
    self.bytes_sent = np.full(len(ends.city), num_bytes)
    self.bytes_received = self.bytes_sent
    # A region's hub takes the answer from above as well.
    self.hub_updates = max(
      len(homes), 1 + max(len(members) for members in self._members)
    )

  def exchange(
    self, ready: np.ndarray, rng: np.random.Generator | None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Averages an update over all islands; near ones have it sooner."""
    have_all = np.array(
      [
        hub.collect(ready[members], rng)
        for hub, members in zip(self._regional, self._members, strict=True)
      ]
    )
    _, starts = self._above.exchange(have_all, rng)
    end = np.empty_like(ready)
    for hub, members, start in zip(
      self._regional, self._members, starts, strict=True
    ):
      end[members] = hub.give(start, rng)
    return ready, end

  def routes(
    self, num_exchanges: int, wall_secs: float
  ) -> tuple[network_exchange.Route, ...]:
    """What passed between cities in so many exchanges, hubs' routes last."""
    return tuple(
      route
      for hub in (*self._regional, self._above)
      for route in hub.routes(num_exchanges, wall_secs)
    )
