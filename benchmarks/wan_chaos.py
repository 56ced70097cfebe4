"""Six islands, really trained, and everything that may go wrong with them.

    sudo ./run.sh python -m benchmarks.wan_chaos [--quick]

Every 15 seconds on average, at random: `kill -9` of an island, SIGSTOP, its
link down, `kill -9` of the hub, a stranger with a key of its own, and updates
that are replayed, not finite, a hundred times too large or of the wrong sign.
A killed program is started again as a supervisor would. The same run without
faults is what efficiency and loss are measured by: its number of steps is the
same, and it comes first.

Real: hub, islands, Flower with TLS and keys, a network namespace for each, the
training of 0.2 M parameters on text. A step takes 0.25 s, of which most is a
pause, so that six machines fit two cores.

Over 300 lines: one run and its faults, read from top to bottom.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import (
  harness,
  wan_chaos_island,
  wan_chaos_simulated,
  wan_links,
  wan_runs,
)
from efficient_llm import sharding
from efficient_llm.data import pipeline
from efficient_llm.diloco.wan.config import IslandsConfig
from efficient_llm.training import evaluation, pretrain, trained_run
from experiments import exits, flower_programs

_PORT = 9092
_LINK = wan_links.Link(bits_per_sec=1e8, round_trip_secs=0.02)
_STEP_SECS = 0.25
# Of the time that the steps alone take.
_PACE = 0.9
_START_SECS = 300.0
_DOWN_SECS = {'kill': 8.0, 'stop': 10.0, 'link': 10.0, 'hub': 5.0}
_STRANGER, _STRANGER_SECS = 'stranger', 20.0
_EVAL_BATCHES = 200


class Run:
  """A hub and islands in their namespaces, from start to end.

  Args:
    rig: The namespaces.
    config: The run.
    workdir: Of the run.
    seed: Of the faults; None for none.
  """

  def __init__(
    self,
    rig: wan_links.Rig,
    config: IslandsConfig,
    workdir: pathlib.Path,
    *,
    seed: int | None,
  ):
    self._rig, self._config, self._workdir = rig, config, workdir
    self._random = None if seed is None else np.random.default_rng(seed)
    self._names = [f'island-{i}' for i in range(config.islands)]
    self._programs: dict[str, subprocess.Popen[bytes]] = {}
    self._later: list[tuple[float, Callable[[], None]]] = []
    self._hurt: set[str] = set()
    self.faults: list[tuple[float, str, str]] = []
    self.ended: list[str] = []
    self.secs = 0.0

  @property
  def hub(self) -> pathlib.Path:
    """The hub's folder."""
    return self._workdir / 'hub'

  def run(self) -> None:
    """Until the hub has ended."""
    try:
      self._start()
      self._follow()
    finally:
      for program in self._programs.values():
        _kill(program)

  def bad_sent(self) -> list[tuple[str, str, int]]:
    """Kind, island and last batch of each update that was spoilt."""
    found = []
    for name in self._names:
      path = self._workdir / name / wan_chaos_island.BAD_SENT
      for line in path.read_text().splitlines() if path.exists() else []:
        kind, _, position = line.partition(',')
        found.append((kind, name, int(position)))
    return found

  def _start(self) -> None:
    """Starts all programs and waits until all islands could begin."""
    from efficient_llm.diloco.wan import keys

    for i in range(len(self._names)):
      self._rig.set_link(i, _LINK)
    folder = self._workdir / 'keys'
    keys.make(folder, hosts=[wan_links.HUB_ADDRESS], islands=self._names)
    other = self._workdir / 'other_keys'
    keys.make(other, hosts=[], islands=[_STRANGER])
    # The authority beside it is the hub's, its public half is not there.
    shutil.copy(other / 'islands' / f'{_STRANGER}.key', folder / 'islands')
    self._start_hub()
    for i in range(len(self._names)):
      self._start_island(i)
    ready = [
      self._workdir / name / wan_chaos_island.READY for name in self._names
    ]
    end = time.monotonic() + _START_SECS
    while not all(path.exists() for path in ready):
      self._check(end)
      time.sleep(0.1)

  def _follow(self) -> None:
    """Lets time pass, and harm be done, until the hub ends."""
    start = time.time()
    (self._workdir / 'start').touch()
    plain = self._config.loop.num_steps * _STEP_SECS
    end = time.monotonic() + 2 * plain + 120
    next_fault = start + self._pause()
    while self._programs['hub'].poll() != exits.DONE:
      now = time.time()
      if now > next_fault:
        next_fault = now + self._pause()
        self._do_harm(now - start)
      for due, action in list(self._later):
        if now >= due:
          self._later.remove((due, action))
          action()
      self._check(end)
      time.sleep(0.1)
    # The last line is that of the last round.
    self.secs = (self.hub / 'rounds.jsonl').stat().st_mtime - start

  def _check(self, end: float) -> None:
    """Starts what has ended by itself again; raises if it takes too long."""
    if time.monotonic() > end:
      raise RuntimeError(f'it takes too long; see {self._workdir}')
    for name, program in list(self._programs.items()):
      if program.poll() in (None, exits.DONE) or name in self._hurt:
        continue
      log = (self._workdir / name / 'log.txt').read_text()[-2000:]
      print(f'{name} has ended by itself:\n{log}', file=sys.stderr, flush=True)
      self.ended.append(name)
      if name == 'hub':
        self._start_hub()
      else:
        self._start_island(self._names.index(name))

  def _pause(self) -> float:
    if self._random is None:
      return float('inf')
    mean = wan_chaos_simulated.FAULT_EVERY_SECS
    return float(self._random.exponential(mean))

  def _do_harm(self, secs: float) -> None:
    """A fault, to one that is well."""
    assert self._random is not None
    well = [i for i, name in enumerate(self._names) if name not in self._hurt]
    kinds = [
      kind
      for kind in wan_chaos_simulated.FAULTS
      if not (kind == 'hub' and 'hub' in self._hurt)
    ]
    if not well:
      return
    kind = kinds[self._random.integers(len(kinds))]
    i = well[self._random.integers(len(well))]
    where = kind if kind in ('hub', _STRANGER) else self._names[i]
    self.faults.append((secs, kind, where))
    print(f'{secs:6.1f} s: {kind} {where}', file=sys.stderr, flush=True)
    if kind in wan_chaos_simulated.BAD:
      path = self._workdir / where / wan_chaos_island.BAD
      path.with_suffix('.new').write_text(kind)
      path.with_suffix('.new').rename(path)
    elif kind == _STRANGER:
      self._start_stranger(i)
    else:
      self._hurt.add(where)
      getattr(self, f'_do_{kind}')(i, where)

  def _do_kill(self, i: int, name: str) -> None:
    # What it has started is left to itself, and takes leave of the hub.
    self._programs[name].kill()
    self._soon(name, 'kill', functools.partial(self._start_island, i))

  def _do_stop(self, i: int, name: str) -> None:
    del i
    group = self._programs[name].pid
    os.killpg(group, signal.SIGSTOP)
    self._soon(
      name, 'stop', functools.partial(os.killpg, group, signal.SIGCONT)
    )

  def _do_link(self, i: int, name: str) -> None:
    self._rig.set_up(i, is_up=False)
    self._soon(name, 'link', functools.partial(self._rig.set_up, i, is_up=True))

  def _do_hub(self, i: int, name: str) -> None:
    del i
    _kill(self._programs[name])
    self._soon(name, 'hub', self._start_hub)

  def _soon(self, name: str, kind: str, action: Callable[[], None]) -> None:
    """Undoes a fault after its time."""

    def undo() -> None:
      action()
      self._hurt.discard(name)

    self._later.append((time.time() + _DOWN_SECS[kind], undo))

  def _start_hub(self) -> None:
    self._start_program(
      None,
      'hub',
      'experiments.island_hub',
      f'--keys={self._workdir / "keys"}',
      f'--port={_PORT}',
      '--page=',
    )

  def _start_island(self, i: int) -> None:
    self._start_program(
      i,
      self._names[i],
      'benchmarks.wan_chaos_island',
      *self._link_flags(self._names[i]),
      f'--share={i}/{len(self._names)}',
      f'--step_secs={_STEP_SECS}',
      f'--start={self._workdir / "start"}',
    )

  def _start_stranger(self, i: int) -> None:
    """One whose key the hub does not know."""
    self._hurt.add(_STRANGER)
    self._start_program(
      i, _STRANGER, 'benchmarks.wan_stand_in', *self._link_flags(_STRANGER)
    )
    stranger = self._programs[_STRANGER]
    self._later.append(
      (time.time() + _STRANGER_SECS, functools.partial(_kill, stranger))
    )

  def _link_flags(self, name: str) -> list[str]:
    return [
      f'--hub={wan_links.HUB_ADDRESS}:{_PORT}',
      f'--key={self._workdir / "keys" / "islands" / name}.key',
    ]

  def _start_program(
    self, island: int | None, name: str, module: str, *flags: str
  ) -> None:
    (self._workdir / name).mkdir(exist_ok=True)
    command = [
      *(sys.executable, '-m', module),
      '--config=benchmarks/wan_runs.py:chaos',
      f'--config.loop.num_steps={self._config.loop.num_steps}',
      f'--workdir={self._workdir / name}',
      *flags,
    ]
    with (self._workdir / name / 'log.txt').open('ab') as log:
      self._programs[name] = subprocess.Popen(
        self._rig.inside(island, command),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={
          **os.environ,
          # Six machines' threads would wait for each other on two cores.
          'XLA_FLAGS': '--xla_cpu_multi_thread_eigen=false',
          'JAX_COMPILATION_CACHE_DIR': str(self._workdir.parent / 'programs'),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
        },
      )


def _kill(program: subprocess.Popen[bytes]) -> None:
  """`kill -9` of a program and of all it has started."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(program.pid, signal.SIGKILL)
  program.wait()


def _refusals(hub: pathlib.Path) -> dict[str, int]:
  """How often the hub refused an update, by its reason."""
  lines = (hub / 'rounds.jsonl').read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return dict(
    collections.Counter(x['refused']['reason'] for x in found if 'refused' in x)
  )


def _loss(config: IslandsConfig, hub: pathlib.Path) -> float:
  """Of the shared model on text that no island has read, nats a token."""
  run = trained_run.find(hub, name='hub')
  mesh = sharding.make_mesh(config.mesh)
  program = pretrain.build(config, mesh)
  held_out = pipeline.open_dataset(
    config.data, split='validation', cache_dir=hub.parent / 'cache'
  )
  with jax.set_mesh(mesh):
    found = evaluation.evaluate(
      held_out,
      run.restore_params(program.abstract_state.params),
      eval_step=program.eval_step,
      place=functools.partial(
        sharding.to_global, sharding=program.batch_sharding
      ),
      num_batches=_EVAL_BATCHES,
    )
  return found['loss']


def _measure(rig: wan_links.Rig, secs: float, seed: int) -> dict[str, Any]:
  """Both runs, and what is said of them."""
  config = wan_runs.get_config('chaos')
  periods = int(_PACE * secs / _STEP_SECS) // config.sync_period
  config = dataclasses.replace(
    config,
    loop=dataclasses.replace(
      config.loop, num_steps=periods * config.sync_period
    ),
  )
  config.validate()
  per_batch = float(config.data.batch_size * config.data.sequence_length)
  with tempfile.TemporaryDirectory() as folder:
    runs: dict[str, Run] = {}
    for kind in ('calm', 'storm'):
      workdir = pathlib.Path(folder, kind)
      workdir.mkdir()
      runs[kind] = Run(
        rig, config, workdir, seed=seed if kind == 'storm' else None
      )
      runs[kind].run()
    calm, storm = runs['calm'], runs['storm']
    status = {
      k: json.loads((run.hub / 'status.json').read_bytes())
      for k, run in runs.items()
    }
    losses = {k: _loss(config, run.hub) for k, run in runs.items()}
    rates = {k: status[k]['tokens'] / run.secs for k, run in runs.items()}
    bad = storm.bad_sent()
    lies = {(island, last) for kind, island, last in bad if kind != 'replay'}
    counted = {
      (update['island'], update['last'])
      for _, update in wan_chaos_simulated.counted(storm.hub)
    }
    counts = status['storm']['counts']
    return {
      'faults': len(storm.faults),
      'faults_by_kind': {
        kind: sum(x[1] == kind for x in storm.faults)
        for kind in wan_chaos_simulated.FAULTS
      },
      'ended_by_themselves': {k: run.ended for k, run in runs.items()},
      'rounds': status['storm']['round'],
      'rounds_reopened': counts['reopened'],
      # Each is to move its fragment.
      'rounds_lost': status['storm']['round']
      - sum(status['storm']['versions']),
      'tokens_double_counted': wan_chaos_simulated.tokens_twice(
        storm.hub, tokens_per_batch=per_batch
      ),
      'bad_updates_sent': len(bad),
      'bad_updates_accepted': len(lies & counted),
      'refusals': _refusals(storm.hub),
      'refusals_undisturbed': _refusals(calm.hub),
      'strangers_let_in': sum(
        x['name'] == _STRANGER for x in status['storm']['islands']
      ),
      'digest_mismatches': counts['digest_mismatches'],
      'late_updates': counts['late'],
      'step_efficiency': rates['storm'] / rates['calm'],
      'final_loss': losses['storm'],
      'final_loss_undisturbed': losses['calm'],
      'final_loss_ratio': losses['storm'] / losses['calm'],
      'secs': storm.secs,
      'secs_undisturbed': calm.secs,
      'tokens': status['storm']['tokens'],
      'tokens_undisturbed': status['calm']['tokens'],
      'islands': config.islands,
      'step_secs': _STEP_SECS,
      'seed': seed,
      'log': storm.faults,
    }


def main() -> None:
  """Measures and records, or says why it cannot."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='90 s, not 600')
  parser.add_argument('--secs', type=float, default=600.0, help='of the storm')
  parser.add_argument('--seed', type=int, default=0, help='of the faults')
  values = parser.parse_args()
  islands = wan_runs.get_config('chaos').islands
  try:
    flower_programs.check_installed()
    with wan_links.Rig(islands) as rig:
      secs = 90.0 if values.quick else values.secs
      result = _measure(rig, secs, values.seed)
  except (wan_links.UnavailableError, ValueError) as error:
    print(f'skipped: {error}')
    return
  name = f'wan_chaos{"_quick" if values.quick else ""}'
  harness.record(name, result)


if __name__ == '__main__':
  main()
