import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficient_llm.diloco import links, network
from efficient_llm.diloco.network_config import (
  Group,
  NetworkConfig,
  Schedule,
)

_LOSSLESS = links.Transport(
  loss=0.0, ocean_loss=0.0, jitter=0.0, window_mib=1e6
)
# 1e9 parameters at 8 bits are 8 Gbit.
_GROUP = Group('node', ('Dallas',), uplink_gbits=1.0, downlink_gbits=1.0)
_TRIP_SECS = 0.001


def _config(
  groups: tuple[Group, ...] = (_GROUP,), islands: int = 4, **schedule: Any
) -> NetworkConfig:
  return NetworkConfig(
    num_params=1_000_000_000,
    islands=islands,
    groups=groups,
    schedule=Schedule(**schedule),
    transport=_LOSSLESS,
    num_rounds=3,
  )


def test_an_island_by_itself_never_waits_and_sends_nothing() -> None:
  outcome = network.simulate(_config(islands=1))
  assert outcome.total_utilization == 1.0
  assert outcome.bytes_sent.tolist() == [0.0]


def test_a_ring_sends_two_shares_of_the_update_in_as_many_hops() -> None:
  outcome = network.simulate(_config(islands=4))
  expected = 2 * 3 / 4 * 8.0 + 6 * _TRIP_SECS / 2
  assert outcome.exchange_secs == pytest.approx(np.full(3, expected))
  assert outcome.bytes_sent == pytest.approx(np.full(4, 3 * 1.5e9))


def test_a_ring_is_as_slow_as_its_slowest_link() -> None:
  slow = dataclasses.replace(_GROUP, uplink_gbits=0.1)
  outcome = network.simulate(_config((_GROUP, slow), islands=4))
  assert outcome.exchange_secs == pytest.approx(
    np.full(3, 2 * 3 / 4 * 80.0 + 6 * _TRIP_SECS / 2)
  )


def test_a_blocking_exchange_takes_its_share_of_the_time() -> None:
  outcome = network.simulate(_config(sync_period=50))
  secs = outcome.exchange_secs[0]
  assert outcome.utilization == pytest.approx(np.full(4, 50 / (50 + secs)))


def test_a_hub_takes_all_updates_through_its_own_link() -> None:
  config = _config(islands=6, all_reduce='hub', hub_gbits=2.0)
  outcome = network.simulate(config)
  # 48 Gbit through 2 Gbit/s, in and out; half a round trip to and fro, of
  # which the first is hidden behind the queue.
  assert outcome.exchange_secs == pytest.approx(
    np.full(3, 24 + 24 + _TRIP_SECS / 2)
  )
  assert outcome.hub_busy == pytest.approx(24 * 3 / outcome.wall_secs)


def test_behind_a_wide_hub_each_island_has_its_own_speed() -> None:
  slow = dataclasses.replace(_GROUP, downlink_gbits=0.1)
  config = _config((_GROUP, slow), 2, all_reduce='hub', hub_gbits=100.0)
  outcome = network.simulate(config)
  up, down = 8.0 + _TRIP_SECS / 2, np.array([8.0, 80.0]) + _TRIP_SECS / 2
  # The next update cannot pass before the slow one has this one.
  assert outcome.wait_secs[1] == pytest.approx(3 * (up + down[1]))
  assert outcome.wait_secs[0] > 3 * (up + down[0])


def test_steps_that_go_on_are_not_waited_for() -> None:
  blocking = network.simulate(_config(sync_period=50))
  overlapped = network.simulate(_config(sync_period=50, overlap_steps=5))
  saved = blocking.wait_secs - overlapped.wait_secs
  assert saved == pytest.approx(np.full(4, 3 * 5.0))


def test_an_exchange_shorter_than_its_overlap_costs_nothing() -> None:
  outcome = network.simulate(_config(sync_period=50, overlap_steps=13))
  assert outcome.total_utilization == 1.0


def test_fragments_send_what_the_whole_sends() -> None:
  whole = network.simulate(_config(sync_period=100))
  parts = network.simulate(_config(sync_period=100, num_fragments=8))
  assert len(parts.exchange_secs) == 8 * len(whole.exchange_secs)
  assert parts.bytes_sent == pytest.approx(whole.bytes_sent)


def test_fragments_that_come_faster_than_the_link_wait_for_each_other() -> None:
  # 12 s for the whole, 5 steps of 1 s: the link is never idle.
  config = _config(sync_period=5, num_fragments=5, overlap_steps=4)
  outcome = network.simulate(dataclasses.replace(config, num_rounds=40))
  assert outcome.total_utilization == pytest.approx(5 / 12, rel=0.03)


_FAST = dataclasses.replace(_GROUP, step_secs=1.0)
_SLOW = dataclasses.replace(_GROUP, step_secs=2.5)


def test_who_is_faster_waits_for_the_slowest() -> None:
  groups = tuple(
    dataclasses.replace(g, uplink_gbits=1e6, downlink_gbits=1e6)
    for g in (_FAST, _SLOW)
  )
  outcome = network.simulate(_config(groups, 2, sync_period=100))
  assert outcome.utilization == pytest.approx([1 / 2.5, 1.0], abs=1e-3)


def test_steps_that_match_speeds_leave_nobody_waiting() -> None:
  groups = tuple(
    dataclasses.replace(g, uplink_gbits=1e6, downlink_gbits=1e6)
    for g in (_FAST, _SLOW)
  )
  config = _config(groups, 2, sync_period=100, stragglers='match')
  outcome = network.simulate(config)
  assert outcome.islands.steps.tolist() == [100, 40]
  assert outcome.utilization == pytest.approx([1.0, 1.0], abs=1e-3)


def test_the_fastest_keeps_all_its_steps_whatever_its_speed() -> None:
  group = dataclasses.replace(_GROUP, step_secs=1.3, step_spread=0.7)
  config = _config((group,), 200, sync_period=499, stragglers='match')
  islands = network.place(config)
  assert islands.steps.max() == 499
  assert islands.steps.min() >= 1
  assert islands.steps[islands.step_secs.argmin()] == 499


def test_compute_and_waiting_fill_the_time_of_every_island() -> None:
  group = dataclasses.replace(_GROUP, step_spread=0.3)
  config = _config(
    (group,), 30, all_reduce='hub', num_fragments=4, overlap_steps=3
  )
  outcome = network.simulate(config)
  total = outcome.compute_secs + outcome.wait_secs
  assert total.max() == pytest.approx(outcome.wall_secs)
  # The islands differ by no more than the last exchange and overlap.
  assert total.min() > 0.9 * outcome.wall_secs


def test_the_spans_of_an_island_follow_each_other_without_a_gap() -> None:
  group = dataclasses.replace(_GROUP, step_spread=0.3)
  config = _config((group,), 5, num_fragments=3, overlap_steps=2)
  outcome = network.simulate(config)
  lane = [span for span in outcome.spans if span.kind != 'send']
  assert {span.kind for span in outcome.spans} == {'compute', 'send', 'wait'}
  np.testing.assert_array_equal(lane[0].start, np.zeros(5))
  for before, after in itertools.pairwise(lane):
    np.testing.assert_array_equal(before.end, after.start)


def _world(seed: int) -> NetworkConfig:
  group = dataclasses.replace(
    _GROUP, cities=('Dallas', 'London', 'Tokyo'), step_spread=0.2
  )
  return dataclasses.replace(
    _config((group,), 7), transport=links.Transport(), seed=seed
  )


def test_a_seed_gives_the_same_run_and_another_seed_another() -> None:
  first, again, other = (network.simulate(_world(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first.exchange_secs, again.exchange_secs)
  np.testing.assert_array_equal(first.wait_secs, again.wait_secs)
  assert first.total_utilization != other.total_utilization


@pytest.mark.parametrize('kind', ['ring', 'hub'])
def test_more_bandwidth_is_never_worse(kind: Any) -> None:
  found = []
  for gbits in (0.01, 0.1, 1.0, 10.0):
    group = dataclasses.replace(
      _GROUP,
      cities=('Dallas', 'London', 'Tokyo'),
      uplink_gbits=gbits,
      downlink_gbits=gbits,
    )
    config = _config((group,), 9, all_reduce=kind, hub_gbits=50.0)
    outcome = network.simulate(config, is_random=False)
    found.append(outcome.total_utilization)
  assert found == sorted(found)
  assert found[0] < 0.1 < 0.8 < found[-1]


def test_thousands_of_islands_are_simulated_each() -> None:
  group = dataclasses.replace(_GROUP, step_spread=0.5)
  config = _config(
    (group,), 5000, all_reduce='hub', hub_gbits=1e4, stragglers='match'
  )
  outcome = network.simulate(config)
  assert outcome.utilization.shape == (5000,)
  assert len(np.unique(outcome.compute_secs)) > 4000


@given(
  total=st.integers(1, 300),
  shares=st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
)
def test_every_island_is_in_a_group_and_groups_have_their_shares(
  total: int, shares: list[float]
) -> None:
  groups = tuple(dataclasses.replace(_GROUP, share=x) for x in shares)
  islands = network.place(_config(groups, total))
  counts = np.bincount(islands.group, minlength=len(shares))
  assert counts.sum() == total
  exact = total * np.array(shares) / sum(shares)
  assert (abs(counts - exact) < 1).all()


def test_islands_of_a_group_are_dealt_out_to_its_cities_in_turn() -> None:
  group = dataclasses.replace(_GROUP, cities=('Tokyo', 'Osaka'))
  islands = network.place(_config((group,), 5))
  names = [islands.cities[i].name for i in islands.city]
  assert names == ['Tokyo', 'Osaka', 'Tokyo', 'Osaka', 'Tokyo']


def test_routes_hold_all_bytes_that_are_sent() -> None:
  outcome = network.simulate(_world(0))
  assert sum(route.num_bytes for route in outcome.routes) == pytest.approx(
    outcome.bytes_sent.sum()
  )
  assert all(0 < route.busy < 1 for route in outcome.routes)


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'islands': 0}, 'islands=0 must be at least 1'),
    ({'num_params': -1}, 'num_params=-1'),
    ({'groups': ()}, 'groups'),
    ({'seed': -1}, 'seed=-1'),
    ({'schedule': Schedule(num_fragments=101)}, 'num_fragments=101'),
    ({'schedule': Schedule(overlap_steps=100)}, 'overlap_steps=100'),
    ({'schedule': Schedule(bits_per_parameter=0)}, 'bits_per_parameter=0'),
    ({'schedule': Schedule(hub_city='Oz')}, "City 'Oz'"),
    ({'transport': links.Transport(loss=1.0)}, 'transport.loss=1.0'),
    ({'transport': links.Transport(streams=0)}, 'transport.streams=0'),
    ({'links': (links.Link(('Dallas',)),)}, 'two cities'),
    ({'links': (links.Link(('Dallas', 'Tokyo'), gbits=0.0),)}, 'gbits=0.0'),
    ({'links': (links.Link(('Dallas', 'Tokyo'), loss=2.0),)}, 'loss=2.0'),
    ({'links': (links.Link(('Dallas', 'Tokyo')),)}, 'add the city'),
    ({'groups': (Group('a', ()),)}, 'must have a city'),
    ({'groups': (Group('a', ('Dallas',), share=0.0),)}, 'share=0.0'),
    ({'groups': (Group('a', ('Dallas',), step_spread=-1.0),)}, 'step_spread'),
  ],
)
def test_what_does_not_hold_together_is_refused_in_one_line(
  changes: dict[str, Any], expected: str
) -> None:
  config = dataclasses.replace(_config(), **changes)
  with pytest.raises(ValueError) as error:
    network.simulate(config)
  assert expected in str(error.value)
  assert '\n' not in str(error.value)


def test_the_largest_remainder_gets_the_island_that_is_left() -> None:
  groups = tuple(dataclasses.replace(_GROUP, share=x) for x in (5, 90, 5))
  assert network.place(_config(groups, 3)).group.tolist() == [1, 1, 1]


def test_a_path_to_a_hub_is_busy_for_one_way_at_a_time() -> None:
  outcome = network.simulate(_config(all_reduce='hub', hub_gbits=100.0))
  (route,) = outcome.routes
  assert route.busy == pytest.approx(3 * 8.0 / outcome.wall_secs)
  assert route.num_bytes == pytest.approx(4 * 3 * 2e9)
