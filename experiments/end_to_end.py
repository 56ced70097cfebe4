"""The main job: predicts, grows, distributes, reasons and says what it saved.

./run.sh
./run.sh python -m experiments.end_to_end --workdir=out/own_line \
  --config.target.data.path=my_texts/
"""

import pathlib

from efficient_llm.end_to_end import line
from efficient_llm.end_to_end.config import EndToEndConfig
from experiments import cpu_workers, runner


def run(config: EndToEndConfig, workdir: pathlib.Path) -> int:
  """Runs the line and says where to look."""
  outcome = line.run(config, workdir=workdir, say=runner.say)
  if outcome is not None:
    runner.say(f'Stopped by {outcome.stopped_by}; the same command continues.')
    return runner.STOPPED
  runner.say(f'Report: {workdir / "report.html"}')
  return runner.DONE


if __name__ == '__main__':
  runner.main(
    run,
    default_config='experiments/configs/end_to_end_cpu.py',
    config_type=EndToEndConfig,
    workdir='out/end_to_end',
    before_jax=cpu_workers.start,
  )
