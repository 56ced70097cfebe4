"""What islands get from the network between them: a simulator.

READ FIRST: `simulate`. Islands compute in steps and exchange outer gradients
through a ring or a hub; time passes event by event, and every event is a few
array operations over all islands, so that thousands take seconds.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from efficient_llm.diloco import cities as cities_lib
from efficient_llm.diloco import links, network_exchange, network_regions
from efficient_llm.diloco.network_config import NetworkConfig, Schedule

_DAY_SECS = 86_400


@dataclasses.dataclass(frozen=True)
class Islands:
  """The islands, an entry of each array for each.

  Attributes:
    cities: Places, each once.
    city: Number of the place.
    group: Number of the group.
    step_secs: Seconds of an inner step.
    tokens_per_step: Tokens of an inner step.
    steps: Inner steps in a sync period.
    uplink_bits: Bit/s out.
    downlink_bits: Bit/s in.
  """

  cities: tuple[cities_lib.City, ...]
  city: np.ndarray
  group: np.ndarray
  step_secs: np.ndarray
  tokens_per_step: np.ndarray
  steps: np.ndarray
  uplink_bits: np.ndarray
  downlink_bits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Span:
  """What some islands did from `start` to `end`, in seconds of the run."""

  kind: Literal['compute', 'send', 'wait']
  start: np.ndarray
  end: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What islands got, an entry of each array for each.

  Attributes:
    islands: Who they are.
    compute_secs: Seconds of inner steps.
    wait_secs: Seconds of waiting for the network or for others.
    bytes_sent: By each, the hub aside.
    bytes_received: By each.
    exchange_secs: Of every exchange, from the first start to the last end.
    wall_secs: Of the run.
    routes: What passed between cities.
    hub_busy: Share of the run in which the busiest hub's link was full; None
      without a hub.
    hub_updates: Updates that this hub takes in an exchange; 0 without a hub.
    shown: Numbers of the islands in `spans`.
    spans: The first rounds of those.
  """

  islands: Islands
  compute_secs: np.ndarray
  wait_secs: np.ndarray
  bytes_sent: np.ndarray
  bytes_received: np.ndarray
  exchange_secs: np.ndarray
  wall_secs: float
  routes: tuple[network_exchange.Route, ...]
  hub_busy: float | None
  hub_updates: int
  shown: np.ndarray
  spans: tuple[Span, ...]

  @property
  def utilization(self) -> np.ndarray:
    """Share of its time that each island computes."""
    return self.compute_secs / (self.compute_secs + self.wait_secs)

  @property
  def tokens_per_day(self) -> np.ndarray:
    """Tokens that each island trains on in a day."""
    return self.utilization * self.ideal_tokens_per_day

  @property
  def ideal_tokens_per_day(self) -> np.ndarray:
    """The same if no island ever waited."""
    return _DAY_SECS * self.islands.tokens_per_step / self.islands.step_secs

  @property
  def total_utilization(self) -> float:
    """Tokens of all islands over those if no island ever waited."""
    return float(self.tokens_per_day.sum() / self.ideal_tokens_per_day.sum())


def place(config: NetworkConfig) -> Islands:
  """Deals islands out to groups, cities and speeds."""
  rng = np.random.default_rng([config.seed, 0])
  counts = _shared_out(config.islands, [g.share for g in config.groups])
  group = np.repeat(np.arange(len(config.groups)), counts)
  places = [
    cities_lib.find(one.cities[i % len(one.cities)])
    for one, count in zip(config.groups, counts, strict=True)
    for i in range(count)
  ]
  hub = config.schedule.hub_city
  extra = [] if hub is None else [cities_lib.find(hub)]
  unique = tuple(dict.fromkeys(places + extra))

  def of_group(field: str) -> np.ndarray:
    return np.array([getattr(g, field) for g in config.groups], float)[group]

  spread = of_group('step_spread') * rng.standard_normal(len(group))
  step_secs = of_group('step_secs') * np.exp(spread)
  period = config.schedule.sync_period
  steps = np.full(len(group), period)
  if config.schedule.stragglers == 'match':
    steps = np.maximum(1, np.floor(period * (step_secs.min() / step_secs)))
  return Islands(
    cities=unique,
    city=np.array([unique.index(one) for one in places]),
    group=group,
    step_secs=step_secs,
    tokens_per_step=of_group('tokens_per_step'),
    steps=steps.astype(int),
    uplink_bits=1e9 * of_group('uplink_gbits'),
    downlink_bits=1e9 * of_group('downlink_gbits'),
  )


def simulate(
  config: NetworkConfig, *, is_random: bool = True, max_shown: int = 12
) -> Outcome:
  """Runs some rounds and counts who computed, waited and sent what.

  Every `sync_period` / `num_fragments` steps a fragment is exchanged, after
  the one before it. Islands go on for `overlap_steps`, then wait for it.

  Args:
    config: Islands, paths and schedule.
    is_random: False takes expected delays and losses.
    max_shown: Islands whose first rounds are kept for drawing, from fastest
      to slowest.

  Raises:
    ValueError: If the configuration does not hold together.
  """
  config.validate()
  schedule, islands = config.schedule, place(config)
  network = _network(config, islands)
  rng = np.random.default_rng([config.seed, 1]) if is_random else None
  shown = _spread_out(islands.step_secs, max_shown)
  clock = np.zeros(len(islands.city))
  waited, free = np.zeros_like(clock), np.zeros_like(clock)
  # In a sync period all islands do what here counts as `sync_period` steps.
  secs_per_step = islands.step_secs * islands.steps / schedule.sync_period
  arrivals, durations, spans = {}, [], []
  step = 0
  for at, fragment, kind in _events(schedule, config.num_rounds):
    is_kept = at <= 3 * schedule.sync_period
    before, step, past = clock, at, step
    clock = clock + (at - past) * secs_per_step
    if is_kept:
      spans.append(Span('compute', before[shown], clock[shown]))
    if kind == 'send':
      begin, end = network.exchange(np.maximum(clock, free), rng)
      arrivals[fragment], free = end, end
      durations.append(float(end.max() - begin.min()))
      if is_kept:
        spans.append(Span('send', begin[shown], end[shown]))
    else:
      ready = np.maximum(clock, arrivals.pop(fragment))
      waited += ready - clock
      if is_kept:
        spans.append(Span('wait', clock[shown], ready[shown]))
      clock = ready
  wall_secs = float(clock.max())
  bytes_sent = network.bytes_sent * len(durations)
  hub_busy = None
  if network.hub_updates:
    num_bytes = network.hub_updates * len(durations) * _fragment_bytes(config)
    hub_busy = 8 * num_bytes / (1e9 * schedule.hub_gbits * wall_secs)
  return Outcome(
    islands=islands,
    compute_secs=step * secs_per_step,
    wait_secs=waited,
    bytes_sent=bytes_sent,
    bytes_received=network.bytes_received * len(durations),
    exchange_secs=np.array(durations),
    wall_secs=wall_secs,
    routes=network.routes(len(durations), wall_secs),
    hub_busy=hub_busy,
    hub_updates=network.hub_updates,
    shown=shown,
    spans=tuple(spans),
  )


def _network(
  config: NetworkConfig, islands: Islands
) -> network_exchange.Network:
  """Paths of the islands, as the schedule uses them."""
  schedule = config.schedule
  ends = network_exchange.Ends(
    islands.city, islands.uplink_bits, islands.downlink_bits
  )
  world = links.Map(islands.cities, config.transport, config.links)
  city, bits = _hub_number(config, islands), 1e9 * schedule.hub_gbits
  if schedule.all_reduce == 'regional_hubs':
    return network_regions.RegionalHubs(
      ends,
      world,
      config.transport,
      city=city,
      bits_per_sec=bits,
      num_bytes=_fragment_bytes(config),
    )
  return network_exchange.make(
    schedule.all_reduce,
    ends,
    world,
    config.transport,
    hub_city=city,
    hub_bits=bits,
    num_bytes=_fragment_bytes(config),
  )


def _events(
  schedule: Schedule, num_rounds: int
) -> list[tuple[int, int, Literal['send', 'receive']]]:
  """Steps at which fragments, counted through the run, leave and must be in.

  Where several fall on a step, older fragments come first and a fragment
  leaves before it comes.
  """
  sends = [
    math.ceil((k + 1) * schedule.sync_period / schedule.num_fragments)
    for k in range(num_rounds * schedule.num_fragments)
  ]
  events = [
    *((at, k, 0) for k, at in enumerate(sends)),
    *((at + schedule.overlap_steps, k, 1) for k, at in enumerate(sends)),
  ]
  return [
    (at, k, 'receive' if kind else 'send') for at, k, kind in sorted(events)
  ]


def _fragment_bytes(config: NetworkConfig) -> float:
  bits = config.num_params * config.schedule.bits_per_parameter
  return bits / 8 / config.schedule.num_fragments


def _hub_number(config: NetworkConfig, islands: Islands) -> int:
  name = config.schedule.hub_city
  return 0 if name is None else islands.cities.index(cities_lib.find(name))


def _shared_out(total: int, shares: list[float]) -> np.ndarray:
  """Whole numbers of this sum, as near to the shares as can be."""
  exact = total * np.array(shares) / sum(shares)
  counts = np.floor(exact).astype(int)
  # The largest remainders get what is left over.
  rest = np.argsort(counts - exact, kind='stable')[: total - counts.sum()]
  counts[rest] += 1
  return counts


def _spread_out(step_secs: np.ndarray, count: int) -> np.ndarray:
  """Some islands from the fastest to the slowest, evenly by rank."""
  order = np.argsort(step_secs, kind='stable')
  picked = np.linspace(0, len(order) - 1, min(count, len(order)))
  return order[np.round(picked).astype(int)]
