"""What a hub runs out of, by hand and for a thousand islands."""

import dataclasses

import numpy as np
import pytest

from efficient_llm.diloco import hub_limits, links, network
from efficient_llm.diloco.network_config import (
  Group,
  NetworkConfig,
  Schedule,
)
from experiments.configs import diloco_network

# 2^27 parameters of 8 bits are 2^30 bits; 100 steps of 1 s.
_CONFIG = NetworkConfig(
  num_params=1 << 27,
  islands=6,
  groups=(Group('node', ('Dallas', 'London', 'Tokyo')),),
  schedule=Schedule(
    sync_period=100,
    num_fragments=2,
    all_reduce='hub',
    hub_city='Dallas',
    hub_gbits=(1 << 30) / 1e9,
    hub_gib=16.0,
  ),
  transport=links.Transport(
    loss=0.0, ocean_loss=0.0, jitter=0.0, window_mib=1e6
  ),
  num_rounds=2,
)


def test_a_hub_needs_a_second_of_link_and_two_copies_of_every_update() -> None:
  found = hub_limits.limits(_CONFIG, network.simulate(_CONFIG))
  assert found.updates == 6
  assert found.link_share == pytest.approx(0.06)
  # Three arrays of half a GiB, and twice the half of one for each island.
  assert found.memory_gib == pytest.approx(1.5 + 6 * 0.5)
  assert (found.first, found.most_by_link) == ('memory', 100)
  assert found.most_by_memory == int((16 - 1.5) / 0.5)


def test_the_link_is_the_first_limit_where_it_is_narrow() -> None:
  schedule = dataclasses.replace(_CONFIG.schedule, hub_gbits=0.1)
  config = dataclasses.replace(_CONFIG, schedule=schedule)
  one, regional = hub_limits.compare(config)
  assert one.first == regional.first == 'link'
  # Two islands in each of three regions, and the hub above.
  assert (one.updates, regional.updates) == (6, 3)
  assert regional.link_share == pytest.approx(one.link_share / 2)


def test_islands_of_a_region_do_not_pass_the_others_hubs() -> None:
  schedule = dataclasses.replace(
    _CONFIG.schedule, all_reduce='regional_hubs', num_fragments=1
  )
  config = dataclasses.replace(_CONFIG, schedule=schedule, islands=300)
  secs = network.simulate(config).exchange_secs
  # 100 updates into a region's hub, 3 above, and the same way back.
  assert secs == pytest.approx(np.full(2, 2 * (100 + 3)), abs=1.0)


def test_a_ring_has_no_hub() -> None:
  schedule = dataclasses.replace(_CONFIG.schedule, all_reduce='ring')
  config = dataclasses.replace(_CONFIG, schedule=schedule)
  assert hub_limits.compare(config) == []
  with pytest.raises(ValueError, match="all_reduce='ring' has no hub"):
    hub_limits.limits(config, network.simulate(config))


def test_of_a_thousand_devices_a_hub_in_every_region_takes_a_quarter() -> None:
  config = diloco_network.get_config('thousand')
  one, regional = hub_limits.compare(config)
  assert one.updates == 1000
  assert one.memory_share > 1 > one.link_share
  assert regional.updates < 300
  assert regional.utilization > 1.5 * one.utilization
