"""Predicts the loss of a model from smaller ones (scaling laws).

python -m experiments.scaling --config.data=runs.csv --workdir=out/scaling
python -m experiments.scaling --config.runs='out/*/result.json' \
  --config.target_params=1e9
python -m experiments.scaling --mode=plan --config.target_params=1e9 \
  --config.plan.budget_flops=1e19
"""

import dataclasses
import pathlib

from absl import flags

from efficient_llm.scaling import job
from efficient_llm.scaling.config import ScalingConfig
from efficient_llm.training import processes
from experiments import runner

_MODE = flags.DEFINE_enum(
  'mode', None, ['predict', 'plan'], 'Short for --config.mode.'
)


def run(config: ScalingConfig, workdir: pathlib.Path) -> int:
  """Predicts or plans, and says what came out."""
  if _MODE.value is not None:
    config = dataclasses.replace(config, mode=_MODE.value)
  config.validate()
  processes.on_first(lambda: runner.write_config(config, workdir))
  result = job.run(config, workdir=workdir, say=runner.say)
  for line in result.get('advice', ()):
    runner.say(line)
  for one in result.get('predictions', ()):
    runner.say(
      f'{one["family"]}: {one["loss"]:.3f} nats, '
      f'{one["level"]:.0%} interval {one["low"]:.3f} to {one["high"]:.3f}, for '
      f'{one["num_params"]:.3g} parameters on {one["num_tokens"]:.3g} tokens.'
    )
    for warning in one['warnings']:
      runner.say(f'  Note: {warning}')
  for duel in result.get('a_or_b', ()):
    runner.say(
      f'{duel["a"]} is better than {duel["b"]} with probability '
      f'{duel["probability_a_better"]:.2f}.'
    )
  runner.say(f'Report: {workdir / "report.html"}')
  return runner.DONE


if __name__ == '__main__':
  runner.main(
    run,
    default_config='experiments/configs/scaling.py',
    config_type=ScalingConfig,
    workdir='out/scaling',
  )
