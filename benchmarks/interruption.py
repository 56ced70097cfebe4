"""Training runs in processes of their own, and the moments to end them."""

import dataclasses
import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from typing import Any, Literal

Phase = Literal[
  'start-up', 'compilation', 'steps', 'saving', 'evaluation', 'finishing'
]

_ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_STEPS = 600
EVERY_STEPS = 30
_EVAL_EVERY = 50
_FIELDS = {
  'model.num_layers': 2,
  'model.embed_dim': 64,
  'model.num_heads': 2,
  'data.sequence_length': 64,
  'loop.num_steps': NUM_STEPS,
  'loop.log_every': 1,
  'loop.eval_every': _EVAL_EVERY,
  'loop.eval_batches': 4,
  'loop.checkpoint.every_steps': EVERY_STEPS,
  'sampling.max_new_tokens': 20,
}
# How long after its sign a phase may last.
_SECS: dict[Phase, float] = {
  'start-up': 4.0,
  'compilation': 4.0,
  'steps': 0.05,
  'saving': 0.05,
  'evaluation': 0.1,
  'finishing': 3.0,
}
_PATIENCE_SECS = 240.0


@dataclasses.dataclass(frozen=True)
class Interruption:
  """A signal in a phase."""

  number: signal.Signals
  phase: Phase


def start(workdir: pathlib.Path, log: pathlib.Path) -> subprocess.Popen[bytes]:
  """Starts or continues the run of a folder; standard error goes to `log`."""
  fields = [f'--config.{name}={value}' for name, value in _FIELDS.items()]
  with log.open('wb') as stream:
    return subprocess.Popen(
      [
        sys.executable,
        '-m',
        'experiments.pretrain',
        f'--workdir={workdir}',
        f'--config.data.cache_dir={workdir.parent / "tokens"}',
        *fields,
      ],
      cwd=_ROOT,
      stdout=subprocess.DEVNULL,
      stderr=stream,
    )


def wait(process: subprocess.Popen[bytes]) -> int | None:
  """The exit code; None for a process that hangs and is killed for it."""
  try:
    return process.wait(_PATIENCE_SECS)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()
    return None


def await_moment(
  process: subprocess.Popen[bytes],
  workdir: pathlib.Path,
  log: pathlib.Path,
  *,
  phase: Phase,
  rng: random.Random,
) -> bool:
  """Waits for a random moment of a phase; False if the process ends first."""
  started = time.time()
  first_steps: list[int] = []
  num_steps = rng.randrange(1, 2 * EVERY_STEPS)

  def has_begun() -> bool:
    if phase == 'start-up':
      return True
    if b'Model: ' not in log.read_bytes():
      return False
    if phase == 'compilation':
      return True
    checkpoints = workdir / 'checkpoints'
    if phase == 'finishing':
      return (checkpoints / str(NUM_STEPS)).exists()
    line = _last_line(workdir)
    # Lines of the process before do not count.
    if line is None or line['time'] < started:
      return False
    if not first_steps:
      first_steps.append(line['step'])
    if phase == 'saving':
      return any(checkpoints.glob('*.partial'))
    if phase == 'evaluation':
      return line['kind'] == 'train' and line['step'] % _EVAL_EVERY == 0
    return line['step'] >= first_steps[0] + num_steps

  while not has_begun():
    if process.poll() is not None or time.time() > started + _PATIENCE_SECS:
      return False
    time.sleep(0.002)
  time.sleep(rng.uniform(0, _SECS[phase]))
  return process.poll() is None


def _last_line(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The newest complete line of metrics."""
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return None
  with path.open('rb') as file:
    file.seek(0, 2)
    file.seek(max(0, file.tell() - 4096))
    lines = file.read().split(b'\n')
  # The first may be cut off by the seek, the last by the writer.
  return json.loads(lines[-2]) if len(lines) > 2 else None


def last_step(workdir: pathlib.Path) -> int:
  """The newest step that a run has written metrics of."""
  line = _last_line(workdir)
  return 0 if line is None else line['step']


def resumed_at(log: pathlib.Path) -> int | None:
  """Where a process went on; None if it ended before it did."""
  text = log.read_text(encoding='utf-8', errors='replace')
  if found := re.search(r'Resumed at step (\d+)', text):
    return int(found[1])
  return 0 if f'step 1/{NUM_STEPS}' in text else None
