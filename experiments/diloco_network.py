"""What islands would get from the network between them, without the islands.

python -m experiments.diloco_network --workdir=out/network
python -m experiments.diloco_network --config.islands=4096 \
  --config=experiments/configs/diloco_network.py:home

Reproduces published figures first (INTELLECT-1, Streaming DiLoCo), then
simulates the islands of the configuration. --config.schedule.FIELD=VALUE
changes when they talk, --config.transport.FIELD=VALUE how; cities, speeds and
single links are in the configuration file.
"""

import pathlib

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
  runner.say(f'Report: {workdir / "report.html"}')
  return runner.DONE


if __name__ == '__main__':
  runner.main(
    run,
    default_config='experiments/configs/diloco_network.py',
    config_type=NetworkConfig,
    workdir='out/network',
  )
