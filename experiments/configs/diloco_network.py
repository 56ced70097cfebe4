"""Islands on three continents, or in a thousand homes.

Papers:   Douillard et al. 2023, DiLoCo, arXiv:2311.08105; Jaghouar et al. 2024,
          INTELLECT-1, arXiv:2412.01152
Command:  ./run.sh python -m experiments.diloco_network
          ./run.sh python -m experiments.diloco_network \
              --config=experiments/configs/diloco_network.py:home
          ./run.sh python -m experiments.diloco_network \
              --config=experiments/configs/diloco_network.py:thousand
Hardware: one CPU core
Time:     5 seconds
Expected: 82 % for the first, with every exchange waited for, and all with
          streaming; 84 % for the second; what a hub of a thousand devices,
          phones to nodes of 8 GPUs, runs out of first
"""

from efficient_llm.diloco import links
from efficient_llm.diloco.network_config import (
  Group,
  NetworkConfig,
  Schedule,
)

_WORLD = ('San Jose', 'Dallas', 'Washington', 'London', 'Frankfurt', 'Tokyo')


def get_config(name: str = 'nodes') -> NetworkConfig:
  """'nodes': 14 of 8 H100; 'home', 'thousand': 1,000 devices of mixed speed."""
  known = {'nodes': _nodes, 'home': _home, 'thousand': _thousand}
  if name not in known:
    raise ValueError(f'{name!r} must be one of {", ".join(known)}.')
  return known[name]()


def _nodes() -> NetworkConfig:
  """INTELLECT-1's size: 10 B parameters as int8, 100 steps in 38 minutes."""
  return NetworkConfig(
    num_params=10_000_000_000,
    islands=14,
    groups=(
      Group(
        'node of 8 H100',
        _WORLD,
        step_secs=22.8,
        tokens_per_step=1_048_576,
        uplink_gbits=4.0,
        downlink_gbits=4.0,
      ),
    ),
    schedule=Schedule(sync_period=100, bits_per_parameter=8.0),
    # The losses that INTELLECT-1's times imply for these cities.
    transport=links.Transport(loss=1.6e-6, ocean_loss=6.7e-6),
  )


def _home() -> NetworkConfig:
  """A model of 500 M parameters on consumer devices behind a hub."""
  return NetworkConfig(
    num_params=500_000_000,
    islands=1000,
    groups=(
      Group(
        'graphics card on fibre',
        (*_WORLD, 'Helsinki', 'Singapore'),
        share=0.3,
        step_secs=4.0,
        step_spread=0.3,
        tokens_per_step=65_536,
        uplink_gbits=0.3,
        downlink_gbits=0.8,
      ),
      Group(
        'graphics card on cable',
        (*_WORLD, 'Sao Paulo', 'Mumbai'),
        share=0.5,
        step_secs=6.0,
        step_spread=0.4,
        tokens_per_step=65_536,
        uplink_gbits=0.03,
        downlink_gbits=0.3,
      ),
      Group(
        'laptop',
        (*_WORLD, 'Madrid', 'Sydney'),
        share=0.2,
        step_secs=30.0,
        step_spread=0.5,
        tokens_per_step=65_536,
        uplink_gbits=0.02,
        downlink_gbits=0.2,
      ),
    ),
    schedule=Schedule(
      sync_period=500,
      num_fragments=10,
      overlap_steps=5,
      bits_per_parameter=4.0,
      all_reduce='hub',
      hub_city='Washington',
      hub_gbits=25.0,
      stragglers='match',
    ),
    transport=links.Transport(window_mib=4.0),
    num_rounds=10,
  )


def _thousand() -> NetworkConfig:
  """A model of 150 M parameters on all that there is, through one hub."""
  everywhere = (*_WORLD, 'Madrid', 'Sao Paulo', 'Mumbai', 'Osaka', 'Sydney')

  def group(
    name: str, share: float, step_secs: float, up: float, down: float
  ) -> Group:
    return Group(
      name,
      everywhere,
      share=share,
      step_secs=step_secs,
      step_spread=0.4,
      tokens_per_step=32_768,
      uplink_gbits=up,
      downlink_gbits=down,
    )

  return NetworkConfig(
    num_params=150_000_000,
    islands=1000,
    # FLOPs of 3e13 a step at a third of each kind's peak, roughly.
    groups=(
      group('phone', 0.4, 90.0, 0.02, 0.1),
      group('laptop', 0.3, 20.0, 0.03, 0.2),
      group('graphics card', 0.25, 1.5, 0.1, 0.5),
      group('node of 8 GPUs', 0.05, 0.02, 4.0, 4.0),
    ),
    schedule=Schedule(
      sync_period=100_000,
      num_fragments=4,
      overlap_steps=5_000,
      bits_per_parameter=4.25,
      all_reduce='hub',
      hub_city='Washington',
      hub_gbits=1.0,
      hub_gib=64.0,
      stragglers='match',
    ),
    transport=links.Transport(window_mib=4.0),
    num_rounds=4,
  )
