"""Which islands, how they are linked, and when they talk."""

import dataclasses
from typing import Literal

from efficient_llm.diloco import cities as cities_lib
from efficient_llm.diloco import links as links_lib


@dataclasses.dataclass(frozen=True)
class Group:
  """Islands of one kind.

  Attributes:
    name: What they are.
    cities: Where they stand; they are dealt out in turn.
    share: Of all islands, relative to the other groups.
    step_secs: Seconds of an inner step, the network left aside.
    step_spread: Standard deviation of the logarithm of that between islands.
    tokens_per_step: Tokens of an inner step.
    uplink_gbits: Gbit/s that an island sends at most.
    downlink_gbits: Gbit/s that an island receives at most.
  """

  name: str
  cities: tuple[str, ...]
  share: float = 1.0
  step_secs: float = 1.0
  step_spread: float = 0.0
  tokens_per_step: int = 1_048_576
  uplink_gbits: float = 10.0
  downlink_gbits: float = 10.0

  def validate(self) -> None:
    for field in ('share', 'step_secs', 'uplink_gbits', 'downlink_gbits'):
      value = getattr(self, field)
      if value <= 0:
        raise ValueError(
          f'{field}={value} of group {self.name!r} must be above 0; change it.'
        )
    if self.step_spread < 0 or self.tokens_per_step < 1:
      raise ValueError(
        f'step_spread={self.step_spread} of group {self.name!r} must not be '
        f'negative and tokens_per_step={self.tokens_per_step} at least 1.'
      )
    if not self.cities:
      raise ValueError(f'Group {self.name!r} must have a city; name one.')
    for name in self.cities:
      cities_lib.find(name)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When islands exchange what.

  Attributes:
    sync_period: Inner steps from one exchange of a parameter to the next (H).
    num_fragments: Parts of the model, exchanged one after the other (P).
    overlap_steps: Inner steps that go on during an exchange (tau).
    bits_per_parameter: Sent for each parameter, scales included.
    all_reduce: How updates are averaged.
    hub_city: Where the hub stands; None takes the first city.
    hub_gbits: Gbit/s of a hub in each direction.
    hub_gib: GiB of memory of a hub.
    stragglers: 'wait': all islands take as many steps. 'match': slower
      islands take fewer, so that all are ready together (DyLU,
      arXiv:2401.09135).
  """

  sync_period: int = 100
  num_fragments: int = 1
  overlap_steps: int = 0
  bits_per_parameter: float = 8.0
  all_reduce: Literal['ring', 'hub', 'regional_hubs'] = 'ring'
  hub_city: str | None = None
  hub_gbits: float = 10.0
  hub_gib: float = 64.0
  stragglers: Literal['wait', 'match'] = 'wait'

  def validate(self) -> None:
    if not 1 <= self.num_fragments <= self.sync_period:
      raise ValueError(
        f'schedule.num_fragments={self.num_fragments} must be at least 1 and '
        f'at most schedule.sync_period={self.sync_period}; change one.'
      )
    if not 0 <= self.overlap_steps < self.sync_period:
      raise ValueError(
        f'schedule.overlap_steps={self.overlap_steps} must not be negative and '
        f'be below schedule.sync_period={self.sync_period}; change one.'
      )
    for name in ('bits_per_parameter', 'hub_gbits', 'hub_gib'):
      value = getattr(self, name)
      if value <= 0:
        raise ValueError(f'schedule.{name}={value} must be above 0; raise it.')
    if self.hub_city is not None:
      cities_lib.find(self.hub_city)


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
  """All there is to a simulation.

  Attributes:
    num_params: Parameters of the model.
    islands: How many, shared out among the groups.
    groups: What they are.
    schedule: When they talk.
    transport: How they talk.
    links: What is known of single paths.
    num_rounds: Sync periods to simulate.
    seed: Of speeds, delays and losses.
  """

  num_params: int
  groups: tuple[Group, ...]
  islands: int = 8
  schedule: Schedule = Schedule()
  transport: links_lib.Transport = links_lib.Transport()
  links: tuple[links_lib.Link, ...] = ()
  num_rounds: int = 20
  seed: int = 0

  def validate(self) -> None:
    for name in ('num_params', 'islands', 'num_rounds'):
      value = getattr(self, name)
      if value < 1:
        raise ValueError(f'{name}={value} must be at least 1; raise it.')
    if not self.groups:
      raise ValueError('groups=() must not be empty; describe some islands.')
    if self.seed < 0:
      raise ValueError(f'seed={self.seed} must not be negative.')
    for part in (*self.groups, self.schedule, self.transport, *self.links):
      part.validate()
