"""Published runs, and what the simulator makes of the same inputs.

A figure is 'fitted' where an input that no paper gives was set by it, and
'predicted' otherwise. Every fitted input is named.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from efficient_llm.diloco import links, network
from efficient_llm.diloco.network_config import Group, NetworkConfig, Schedule

_AMERICA = ('San Jose', 'Dallas', 'Washington')
_EUROPE = ('London', 'Frankfurt')
_ASIA = ('Tokyo',)


@dataclasses.dataclass(frozen=True)
class Check:
  """A published figure beside the simulated one.

  Attributes:
    source: Where it was published.
    what: Which figure, with its unit.
    published: Its value.
    simulated: What comes out here.
    kind: 'fitted' or 'predicted'.
    note: What was fitted, or what the prediction rests on.
  """

  source: str
  what: str
  published: float
  simulated: float
  kind: str
  note: str


def intellect_1() -> list[Check]:
  """INTELLECT-1: 10 B parameters, int8, a ring, 100 steps in 38 minutes.

  Neither the cities nor the losses were published. Taken are six cities, 14
  islands, 4 Gbit/s each (the top of the published range) and 8 connections.
  The loss within a continent is fitted to the 103 s of the USA, that across
  oceans to the 382 s with Europe; the 469 s of all three continents are
  predicted. It is the ratio of two measured round trips that decides: Dallas
  to Tokyo, 143 ms, over Dallas to London, 113 ms. `intellect_1_by_cities` has
  the predictions for other cities.
  """
  usa, europe, world = _intellect_1(_AMERICA, _EUROPE, _ASIA)
  source = 'INTELLECT-1, Table 2 (arXiv:2412.01152)'
  ocean_loss = world.config.transport.ocean_loss
  notes = (
    ('fitted', f'loss within a continent {usa.config.transport.loss:.2g}'),
    ('fitted', f'loss across an ocean {ocean_loss:.2g}'),
    ('predicted', 'the same losses, the round trips of the slowest link'),
  )
  checks = []
  for run, name, secs, percent, (kind, note) in zip(
    (usa, europe, world),
    ('USA', 'USA + Europe', 'global'),
    (103, 382, 469),
    (95.7, 85.6, 83.0),
    notes,
    strict=True,
  ):
    utilization = 100 * run.outcome.total_utilization
    checks += [
      Check(source, f'{name}, all-reduce, s', secs, run.secs, kind, note),
      Check(source, f'{name}, compute, %', percent, utilization, kind, note),
    ]
  return checks


def intellect_1_by_cities() -> list[tuple[str, float]]:
  """The predicted global utilisation, in %, by cities that might have been."""
  found = []
  for america, europe, asia in itertools.product(
    itertools.combinations(('Dallas', 'New York', 'Washington'), 2),
    itertools.combinations(('London', 'Frankfurt', 'Madrid'), 2),
    (('Tokyo',), ('Osaka',), ('Tokyo', 'Osaka')),
  ):
    places = (('San Jose', *america), europe, asia)
    world = _intellect_1(*places)[-1]
    names = ', '.join(itertools.chain(*places))
    found.append((names, 100 * world.outcome.total_utilization))
  return found


def others() -> list[Check]:
  """Two further systems with published bandwidths.

  ft-diloco: two workers, 51 M parameters in float32, 20 ms, 100 steps; tokens
  and seconds of a round are fitted to two bandwidths, the third is predicted.
  OpenDiLoCo: 1.1 B parameters in float16, four islands, 67.5 minutes of
  computing, links of 127 Mbit/s and more; nothing is fitted.
  """
  secs = {gbits: _two_workers_secs(gbits) for gbits in (1.0, 0.1, 0.05)}
  # Two rates r = tokens / (compute + exchange) give tokens and compute.
  fast, slow = 37.4, 32.0
  compute = (slow * secs[0.1] - fast * secs[1.0]) / (fast - slow)
  tokens = fast * (compute + secs[1.0])
  note = f'{compute:.0f} s of computing a round from the rates at 1 and 0.1'
  source = 'ft-diloco under netem'
  checks = [
    Check(
      source,
      f'thousand tokens/s at {gbits} Gbit/s',
      rate,
      tokens / (compute + secs[gbits]),
      kind,
      note,
    )
    for gbits, rate, kind in (
      (1.0, fast, 'fitted'),
      (0.1, slow, 'fitted'),
      (0.05, 27.4, 'predicted'),
    )
  ]
  config = NetworkConfig(
    num_params=1_100_000_000,
    islands=4,
    groups=(
      Group(
        'node',
        ('Dallas',),
        step_secs=67.5 * 60 / 125,
        uplink_gbits=0.127,
        downlink_gbits=0.127,
      ),
    ),
    schedule=Schedule(sync_period=125, bits_per_parameter=16),
    num_rounds=1,
  )
  share = 100 - 100 * _run(config).outcome.total_utilization
  return [
    *checks,
    Check(
      'OpenDiLoCo (arXiv:2407.07852)',
      'all-reduce, % of time',
      6.9,
      share,
      'predicted',
      'a ring at the slowest published bandwidth; theirs is not a ring',
    ),
  ]


@dataclasses.dataclass(frozen=True)
class _Run:
  config: NetworkConfig
  outcome: network.Outcome
  secs: float


def _run(config: NetworkConfig) -> _Run:
  outcome = network.simulate(config, is_random=False)
  return _Run(config, outcome, float(outcome.exchange_secs[0]))


def _intellect_1(
  america: Sequence[str], europe: Sequence[str], asia: Sequence[str]
) -> tuple[_Run, _Run, _Run]:
  """Fits the two losses, then predicts."""

  def config(cities: Sequence[str], transport: links.Transport):
    group = Group(
      'node of 8 H100',
      tuple(cities),
      step_secs=38 * 60 / 100,
      uplink_gbits=4.0,
      downlink_gbits=4.0,
    )
    return NetworkConfig(
      num_params=10_000_000_000,
      islands=14,
      groups=(group,),
      transport=transport,
      num_rounds=1,
    )

  usa = _fitted(config(america, links.Transport()), 'loss', 103.0)
  both = (*america, *europe)
  europe_run = _fitted(config(both, usa.config.transport), 'ocean_loss', 382.0)
  world = (*both, *asia)
  return usa, europe_run, _run(config(world, europe_run.config.transport))


def _fitted(config: NetworkConfig, field: str, secs: float) -> _Run:
  """Sets a loss so that the exchange takes this long."""
  for _ in range(12):
    run = _run(config)
    # A loss bound goes with the root of the loss; delays are a small rest.
    loss = getattr(config.transport, field) * (secs / run.secs) ** 2
    transport = dataclasses.replace(config.transport, **{field: loss})
    config = dataclasses.replace(config, transport=transport)
  return _run(config)


def _two_workers_secs(gbits: float) -> float:
  group = Group('worker', ('Dallas', 'Washington'))
  config = NetworkConfig(
    num_params=51_000_000,
    islands=2,
    groups=(group,),
    schedule=Schedule(bits_per_parameter=32),
    transport=links.Transport(loss=0.0),
    links=(
      links.Link(
        ('Dallas', 'Washington'), gbits=gbits, round_trip_ms=20.0, loss=0.0
      ),
    ),
    num_rounds=1,
  )
  return _run(config).secs
