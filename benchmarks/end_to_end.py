"""The main job: what it saves, how long it takes, and what kills do to it.

    ./run.sh python -m benchmarks.end_to_end [--kills=5]

Runs `experiments.end_to_end` from the beginning in a process of its own and
records its result.json, with the seconds of the whole command. With --kills the
small line (`:quick`) is made once without interruption and once with as many
`kill -9` at random moments, each time started again; `differences` names the
figures that then differ, but for seconds and what follows from them.
"""

import argparse
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import harness

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_CONFIG = 'experiments/configs/end_to_end_cpu.py'
# Speeds are measured anew; which drafts a round tries hangs on them, and with
# it the last digits of a token's probability.
_OF_THE_CLOCK = ('secs', 'speedup', 'same_tokens', 'verdicts', 'stages')
_LEFT_OUT = ('config', 'environment', 'finished', 'verdicts')


def start(workdir: pathlib.Path, config: str) -> subprocess.Popen[bytes]:
  """Starts or continues a line."""
  command = ['-m', 'experiments.end_to_end', '--cpu_workers=2']
  return subprocess.Popen(
    [sys.executable, *command, f'--config={config}', f'--workdir={workdir}'],
    cwd=_ROOT,
    stdout=sys.stderr,
    start_new_session=True,
  )


def finish(process: subprocess.Popen[bytes], workdir: pathlib.Path) -> Any:
  """Waits for a line and gives its result."""
  if code := process.wait():
    raise SystemExit(f'The line in {workdir} ended with exit code {code}.')
  return json.loads((workdir / 'result.json').read_bytes())


def interrupted(
  workdir: pathlib.Path, *, kills: int, secs: float, seed: int
) -> tuple[dict[str, Any], list[float]]:
  """A line that is killed at random moments; its result and the moments.

  Args:
    workdir: Its folder.
    kills: How often.
    secs: That it takes without.
    seed: Of the moments.
  """
  rng = random.Random(seed)
  moments = []
  for _ in range(kills):
    process = start(workdir, f'{_CONFIG}:quick')
    moments.append(rng.uniform(3, secs / 2))
    try:
      process.wait(moments[-1])
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
    process.wait()
  return finish(start(workdir, f'{_CONFIG}:quick'), workdir), moments


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
  """Figures that differ, but for those of the clock."""
  return [
    name
    for name in sorted({*first, *second} - set(_LEFT_OUT))
    if not any(part in name for part in _OF_THE_CLOCK)
    and first.get(name) != second.get(name)
  ]


def main() -> None:
  """Runs the benchmark from the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=0)
  parser.add_argument('--seed', type=int, default=0)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    begun = time.perf_counter()
    config = f'{_CONFIG}:quick' if arguments.kills else _CONFIG
    result = finish(start(folder / 'whole', config), folder / 'whole')
    secs = time.perf_counter() - begun
    if not arguments.kills:
      kept = {k: v for k, v in result.items() if k not in _LEFT_OUT}
      harness.record('end_to_end', {**kept, 'command_secs': secs})
      page = (folder / 'whole' / 'report.html').read_bytes()
      results = _ROOT / 'benchmarks' / 'results'
      (results / 'end_to_end.html').write_bytes(page)
      return
    again, moments = interrupted(
      folder / 'killed',
      kills=arguments.kills,
      secs=secs,
      seed=arguments.seed,
    )
    harness.record(
      'end_to_end_kills',
      {
        'kills': arguments.kills,
        'killed_after_secs': moments,
        'differences': differences(result, again),
        'command_secs': secs,
        'seed': arguments.seed,
      },
    )


if __name__ == '__main__':
  main()
