"""Kills training runs again and again and compares what comes out in the end.

A small run of experiments.pretrain is made once without interruption. Further
runs of the same command are ended by `kill -9` or SIGTERM at random moments of
every phase (start-up, compilation, steps, saving, evaluation, finishing), each
time started again, and compared: arrays of the last checkpoint and lines of
metrics, bit for bit.

Run:
  ./run.sh python -m benchmarks.crash_resume [--quick]
Takes about six minutes on two CPU cores. Expected: lost_runs 0, bit_identical
true, max_steps_lost at most every_steps and the few steps made while a
checkpoint is written.
"""

import argparse
import collections
import dataclasses
import itertools
import pathlib
import random
import signal
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness, interruption
from efficient_llm.training import array_store, manifest, metrics

_KILLS: dict[interruption.Phase, int] = {
  'start-up': 2,
  'compilation': 3,
  'steps': 6,
  'saving': 4,
  'evaluation': 3,
  'finishing': 2,
}
_SIGTERMS: dict[interruption.Phase, int] = {
  'compilation': 1,
  'steps': 1,
  'saving': 1,
  'evaluation': 1,
  'finishing': 1,
}
# Before the program has begun, SIGTERM ends a process as any other.
_EXPECTED_CODES: dict[signal.Signals, tuple[int, ...]] = {
  signal.SIGKILL: (-signal.SIGKILL,),
  signal.SIGTERM: (3, -signal.SIGTERM),
}
# What depends on the clock, so no two runs agree in it.
_CLOCK = frozenset({'time', 'step_secs', 'tokens_per_sec', 'mfu'})
_RUNS_AT_ONCE = 2


@dataclasses.dataclass
class Findings:
  """What became of the interrupted runs; `lock` guards it."""

  lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
  done: list[interruption.Interruption] = dataclasses.field(
    default_factory=list
  )
  steps_lost: list[int] = dataclasses.field(default_factory=list)
  steps_lost_by_sigterm: list[int] = dataclasses.field(default_factory=list)
  sigterm_codes: list[int] = dataclasses.field(default_factory=list)
  losses: list[str] = dataclasses.field(default_factory=list)
  differences: list[str] = dataclasses.field(default_factory=list)
  num_runs: int = 0


def main() -> None:
  """Runs the benchmark from the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='a quarter as many')
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    result = measure(
      pathlib.Path(folder),
      wanted=_planned(_KILLS, _SIGTERMS)[:: 5 if options.quick else 1],
      seed=options.seed,
    )
  harness.record('crash_resume', result)


def measure(
  folder: pathlib.Path,
  *,
  wanted: Sequence[interruption.Interruption],
  seed: int,
) -> dict[str, Any]:
  """Interrupts runs until every interruption has found a run to hit."""
  start = time.monotonic()
  whole = folder / 'whole'
  code = interruption.wait(interruption.start(whole, folder / 'whole.log'))
  if code != 0:
    raise RuntimeError(f'the uninterrupted run ended with {code}')
  whole_secs = time.monotonic() - start
  rng = random.Random(seed)
  waiting = list(wanted)
  rng.shuffle(waiting)
  findings = Findings()
  with futures.ThreadPoolExecutor(_RUNS_AT_ONCE) as pool:
    while waiting:
      # About seven fit into a run before it ends.
      num_runs = -(-len(waiting) // 7)
      shares = [waiting[index::num_runs] for index in range(num_runs)]
      seeds = [rng.randrange(1 << 32) for _ in shares]
      number = findings.num_runs
      missed = pool.map(
        lambda share, seed, index: _interrupted_run(
          folder / f'run{index}', share, random.Random(seed), whole, findings
        ),
        shares,
        seeds,
        range(number, number + num_runs),
      )
      waiting = [late for share in missed for late in share]
      findings.num_runs += num_runs
      if findings.losses:
        break
  return {
    **_summary(findings),
    'whole_run_secs': whole_secs,
    'secs': time.monotonic() - start,
    'seed': seed,
  }


def _planned(
  kills: Mapping[interruption.Phase, int],
  sigterms: Mapping[interruption.Phase, int],
) -> list[interruption.Interruption]:
  return [
    interruption.Interruption(number, phase)
    for number, counts in (
      (signal.SIGKILL, kills),
      (signal.SIGTERM, sigterms),
    )
    for phase, count in counts.items()
    for _ in range(count)
  ]


def _summary(findings: Findings) -> dict[str, Any]:
  by_phase = collections.Counter(
    f'{x.number.name} {x.phase}' for x in findings.done
  )
  numbers = [x.number for x in findings.done]
  return {
    'kills': numbers.count(signal.SIGKILL),
    'sigterms': numbers.count(signal.SIGTERM),
    'lost_runs': len(findings.losses),
    'bit_identical': not findings.differences and not findings.losses,
    'max_steps_lost': max(findings.steps_lost, default=0),
    'max_steps_lost_by_sigterm': max(findings.steps_lost_by_sigterm, default=0),
    'every_steps': interruption.EVERY_STEPS,
    'runs': findings.num_runs,
    'by_phase': dict(sorted(by_phase.items())),
    'sigterm_exit_codes': dict(
      sorted(collections.Counter(map(str, findings.sigterm_codes)).items())
    ),
    'losses': findings.losses,
    'differences': findings.differences,
  }


def _interrupted_run(
  workdir: pathlib.Path,
  interruptions: Sequence[interruption.Interruption],
  rng: random.Random,
  whole: pathlib.Path,
  findings: Findings,
) -> list[interruption.Interruption]:
  """Makes a run that is interrupted; returns what came too late for it."""
  late = [x for x in interruptions if x.phase == 'finishing']
  queue = collections.deque(x for x in interruptions if x not in late)
  queue.extend(late)
  reached = None
  while True:
    log = workdir.with_suffix(f'.{len(queue)}.log')
    process = interruption.start(workdir, log)
    if queue and interruption.await_moment(
      process, workdir, log, phase=queue[0].phase, rng=rng
    ):
      process.send_signal(queue[0].number)
    code = interruption.wait(process)
    with findings.lock:
      if (
        reached is not None
        and (resumed := interruption.resumed_at(log)) is not None
      ):
        number, last = reached
        lost = findings.steps_lost
        if number == signal.SIGTERM:
          lost = findings.steps_lost_by_sigterm
        lost.append(last - resumed)
        reached = None
      if code == 0:
        # What is left in the queue came too late for this run.
        found = _differences(workdir, whole)
        findings.differences += [f'{workdir.name}: {x}' for x in found]
        return list(queue)
      if not queue or code not in _EXPECTED_CODES[queue[0].number]:
        text = log.read_text(encoding='utf-8', errors='replace')
        findings.losses.append(f'{workdir.name}: {code}: {text[-500:]}')
        return []
      hit = queue.popleft()
      findings.done.append(hit)
      if hit.number == signal.SIGTERM:
        findings.sigterm_codes.append(code)
      reached = reached or (hit.number, interruption.last_step(workdir))


def _differences(workdir: pathlib.Path, other: pathlib.Path) -> list[str]:
  """What of two finished runs is not the same, bit for bit."""
  found = []
  arrays, others = _arrays(workdir), _arrays(other)
  if arrays.keys() != others.keys():
    found.append('leaves')
  found += [
    f'leaf {name}'
    for name in arrays.keys() & others.keys()
    if arrays[name].tobytes() != others[name].tobytes()
  ]
  position = f'checkpoints/{interruption.NUM_STEPS}/data_state.json'
  if (workdir / position).read_bytes() != (other / position).read_bytes():
    found.append(position)
  lines, others = _lines(workdir), _lines(other)
  if lines != others:
    # The first that differs, or the first that one of them lacks.
    pairs = itertools.zip_longest(lines, others)
    unlike = next(pair for pair in pairs if pair[0] != pair[1])
    found.append(f'metrics.jsonl: {unlike}')
  if not (workdir / 'report.html').exists():
    found.append('report.html')
  return found


def _arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """All arrays of the last checkpoint, optimiser state and all."""
  folder = workdir / 'checkpoints' / str(interruption.NUM_STEPS)
  saved = manifest.read(folder).leaves
  wanted = {
    leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
    for leaf in saved
  }
  return array_store.load(folder, wanted, saved=saved)


def _lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
  return [
    {name: value for name, value in line.items() if name not in _CLOCK}
    for line in metrics.read_metrics(workdir)
  ]


if __name__ == '__main__':
  main()
