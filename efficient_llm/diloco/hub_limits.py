"""What limits a hub first, by what a simulation asks of it."""

import dataclasses

from efficient_llm.diloco import network
from efficient_llm.diloco.network_config import NetworkConfig

_FLOAT_BYTES = 4
# Parameters, the outer momentum, and what encoding left over.
_SHARED_ARRAYS = 3
# As they come and, side by side, as they are merged.
_COPIES_OF_UPDATES = 2
_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class HubLimits:
  """What the busiest hub needs of what it has.

  Attributes:
    kind: 'hub' or 'regional_hubs'.
    updates: That it takes in an exchange.
    link_share: Of its link's time, in each direction.
    memory_gib: For what is shared and the updates of a round.
    memory_share: Of its memory.
    first: 'link' or 'memory', of which it needs more.
    most_by_link: So many such updates in an exchange fill the link.
    most_by_memory: So many fill the memory.
    utilization: Of the islands, in tokens.
  """

  kind: str
  updates: int
  link_share: float
  memory_gib: float
  memory_share: float
  first: str
  most_by_link: int
  most_by_memory: int
  utilization: float


def compare(config: NetworkConfig) -> list[HubLimits]:
  """Simulates the same islands with one hub, and with one in every region.

  Gives nothing where the schedule has no hub.
  """
  found = []
  if config.schedule.all_reduce == 'ring':
    return found
  for kind in ('hub', 'regional_hubs'):
    schedule = dataclasses.replace(config.schedule, all_reduce=kind)
    changed = dataclasses.replace(config, schedule=schedule)
    found.append(limits(changed, network.simulate(changed)))
  return found


def limits(config: NetworkConfig, outcome: network.Outcome) -> HubLimits:
  """What a hub needs.

  Args:
    config: Of the simulation.
    outcome: What came of it.

  Raises:
    ValueError: If it had no hub.
  """
  schedule = config.schedule
  if outcome.hub_busy is None:
    raise ValueError(
      f'schedule.all_reduce={schedule.all_reduce!r} has no hub; set hub or '
      'regional_hubs.'
    )
  # Undisturbed, all islands need so long for a period.
  period_secs = float((outcome.islands.step_secs * outcome.islands.steps).max())
  num_bits = config.num_params * schedule.bits_per_parameter
  link_share = (
    outcome.hub_updates * num_bits / (1e9 * schedule.hub_gbits * period_secs)
  )
  shared = _SHARED_ARRAYS * _FLOAT_BYTES * config.num_params / _GIB
  one = (_COPIES_OF_UPDATES * _FLOAT_BYTES * config.num_params) / (
    schedule.num_fragments * _GIB
  )
  memory_gib = shared + outcome.hub_updates * one
  memory_share = memory_gib / schedule.hub_gib
  return HubLimits(
    kind=schedule.all_reduce,
    updates=outcome.hub_updates,
    link_share=link_share,
    memory_gib=memory_gib,
    memory_share=memory_share,
    first='link' if link_share >= memory_share else 'memory',
    most_by_link=int(outcome.hub_updates / link_share),
    most_by_memory=max(0, int((schedule.hub_gib - shared) / one)),
    utilization=outcome.total_utilization,
  )
