"""What islands would get from the network between them, without the islands.

python -m experiments.diloco_network --workdir=out/network
python -m experiments.diloco_network --config.islands=4096 \
  --config=experiments/configs/diloco_network.py:home
python -m experiments.diloco_network \
  --config=experiments/configs/diloco_network.py:thousand

Reproduces published figures first (INTELLECT-1, Streaming DiLoCo), then
simulates the islands of the configuration. --config.schedule.FIELD=VALUE
changes when they talk, --config.transport.FIELD=VALUE how; cities, speeds and
single links are in the configuration file. With a hub it says what limits it
first, and what a hub in every region would change.
"""

import pathlib
from typing import Any

from efficient_llm.diloco import network_report
from efficient_llm.diloco.network_config import NetworkConfig
from efficient_llm.training import units
from experiments import runner


def run(config: NetworkConfig, workdir: pathlib.Path) -> int:
  """Simulates and says where to look."""
  result = network_report.write(config, workdir=workdir)
  table = result['published']['streaming_table']
  runner.say(
    f'Streaming DiLoCo, Table 4: {table["within_a_point"]} of '
    f'{table["cells"]} bandwidths within a point of utilisation.'
  )
  for check in result['published']['checks']:
    runner.say(
      f'{check["source"]}: {check["what"]}: {check["published"]:g} published, '
      f'{check["simulated"]:.4g} {check["kind"]}.'
    )
  for option in result['options']:
    runner.say(
      f'{option["utilization"]:6.1%} '
      f'{units.format_count(option["tokens_per_day"]):>6} tokens a day  '
      f'{option["name"]}'
    )
  for limits in result['hub_limits']:
    runner.say(_limits_line(limits))
  runner.say(f'Report: {workdir / "report.html"}')
  return runner.DONE


def _limits_line(limits: dict[str, Any]) -> str:
  name = 'One hub'
  if limits['kind'] == 'regional_hubs':
    name = 'A hub in every region, the busiest'
  return (
    f'{name}: {limits["updates"]} updates a round; '
    f'link {limits["link_share"]:.0%} used, full at '
    f'{limits["most_by_link"]}; memory {limits["memory_gib"]:.0f} GiB, '
    f'{limits["memory_share"]:.0%} used, full at {limits["most_by_memory"]}: '
    f'the {limits["first"]} is its first limit. Islands compute '
    f'{limits["utilization"]:.1%}.'
  )


if __name__ == '__main__':
  runner.main(
    run,
    default_config='experiments/configs/diloco_network.py',
    config_type=NetworkConfig,
    workdir='out/network',
  )
