"""How much of their time islands compute, on links like INTELLECT-1's.

    sudo ./run.sh python -m benchmarks.wan_utilisation [--quick]

INTELLECT-1 (arXiv:2412.01152) trained 10 B parameters for 38 minutes between
two exchanges, and published the share of time its nodes computed in the USA,
with Europe, and on three continents. Here all times are divided by `dilation`
and all bytes by 10 B over the model's parameters; the rates of the links follow
from the effective ones of INTELLECT-1, round trips are those between the cities
over `dilation`. Its nodes, 14 in a ring, sent and received 26/14 of the model;
through a hub it is the whole both ways, so rates are 14/13 of theirs, and the
ratio of exchange to compute is theirs.

Real: the hub (experiments.island_hub), its checks, merging and encoding; eight
islands' side of the conversation; Flower's programs with TLS and keys; each in
a network namespace of its own, with the kernel's limit on its rate. A stand-in:
the islands' steps only sleep (benchmarks.wan_stand_in), as eight trainings do
not fit two cores. Not dilated: what programs take by themselves, of which the
hub's and eight islands' share these cores, and Flower's chunks of 5 MiB. The
hub's own link has no limit.

Blocking: whole rounds of int8, compute over compute and waiting. Streaming:
int4, four fragments, five of 100 steps overlapped; an island never waits, so
the share is what is left by encoding and applying, and `rounds_kept` says
whether rounds close as often as planned. Bytes are those of the interfaces'
counters over those of the encoded updates.

Over 300 lines: one run through all settings, read from top to bottom.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import harness, wan_links, wan_runs, wan_stand_in
from efficient_llm.diloco import cities
from efficient_llm.diloco.wan import fragment_codec, shared_model
from efficient_llm.models import transformer
from experiments import flower_programs

_ARMS = ('blocking_int8', 'streaming_int4')
_PERIOD_SECS, _NUM_PARAMS = 38 * 60.0, 10e9
_RING_SHARE = 13 / 14
_HUB_CITY = 'Washington'
_PORT = 9092
_START_SECS = 600.0
_AMERICA, _EUROPE = ('Dallas', 'Toronto', 'Washington'), ('Frankfurt', 'London')


@dataclasses.dataclass(frozen=True)
class Setting:
  """One of INTELLECT-1's.

  Attributes:
    name: Where its islands were.
    bits_per_sec: Effective rate of a node.
    published: Share of the time that its nodes computed, in %.
    cities: Where islands are here, in turn.
  """

  name: str
  bits_per_sec: float
  published: float
  cities: tuple[str, ...]


_SETTINGS = (
  Setting('usa', 1.44e9, 95.7, ('Dallas', 'Washington')),
  Setting('usa_europe', 0.39e9, 85.6, (*_AMERICA, *_EUROPE, 'Madrid')),
  Setting(
    'global',
    0.32e9,
    83.0,
    (*_AMERICA, *_EUROPE, 'Madrid', 'Osaka', 'Tokyo'),
  ),
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is measured.

  Attributes:
    settings: One after the other.
    islands: How many.
    dilation: All times are divided by it.
    periods: Measured in each setting.
  """

  settings: tuple[Setting, ...]
  islands: int
  dilation: float
  periods: int


@dataclasses.dataclass(frozen=True)
class Window:
  """A setting's part of a run: seconds, rounds, and bytes of all islands."""

  start: float
  end: float
  rounds: list[dict[str, Any]]
  sent: int
  received: int


class Run:
  """A hub and islands in their namespaces, through all settings.

  Args:
    rig: The namespaces.
    arm: Of the configuration.
    plan: What is measured.
    workdir: Of the run.
  """

  def __init__(
    self, rig: wan_links.Rig, arm: str, plan: Plan, workdir: pathlib.Path
  ):
    self._rig, self._arm, self._plan = rig, arm, plan
    self._workdir = workdir
    config = wan_runs.get_config(arm)
    # One period to warm up, and one in which the last window ends.
    periods = plan.periods * len(plan.settings) + 2
    self.changes = [
      f'--config.islands={plan.islands}',
      f'--config.loop.num_steps={periods * config.sync_period}',
    ]
    self.config = config
    self.num_params = transformer.num_params(config.model)
    self.step_secs = _PERIOD_SECS / plan.dilation / config.sync_period
    self.slot_secs = (
      self.step_secs * config.sync_period / config.fragments.count
    )
    self._names = [f'island-{i}' for i in range(plan.islands)]
    self._processes: list[subprocess.Popen[bytes]] = []

  def measure(self) -> list[dict[str, Any]]:
    """Runs, and gives what was found in each setting."""
    try:
      self._start()
      windows = self._follow()
    finally:
      for process in self._processes:
        process.kill()
        process.wait()
    return [
      self._found(window, setting, first=1 + i * self._plan.periods)
      for i, (window, setting) in enumerate(
        zip(windows, self._plan.settings, strict=True)
      )
    ]

  def _start(self) -> None:
    """Starts all programs and waits until all islands could begin."""
    from efficient_llm.diloco.wan import keys

    self._set_links(self._plan.settings[0])
    folder = self._workdir / 'keys'
    keys.make(folder, hosts=[wan_links.HUB_ADDRESS], islands=self._names)
    shared = [
      f'--config=benchmarks/wan_runs.py:{self._arm}',
      *self.changes,
    ]
    self._run(
      None,
      'experiments.island_hub',
      *shared,
      f'--workdir={self._workdir / "hub"}',
      f'--keys={folder}',
      f'--port={_PORT}',
      '--page=',
    )
    for i, name in enumerate(self._names):
      self._run(
        i,
        'benchmarks.wan_stand_in',
        *shared,
        f'--workdir={self._workdir / name}',
        f'--hub={wan_links.HUB_ADDRESS}:{_PORT}',
        f'--key={folder / "islands" / name}.key',
        f'--seed={i}',
        f'--step_secs={self.step_secs}',
        f'--fast_steps={self.config.sync_period}',
        f'--start={self._workdir / "start"}',
      )
    ready = [self._workdir / name / wan_stand_in.READY for name in self._names]
    self._wait(lambda: all(x.exists() for x in ready), secs=_START_SECS)
    (self._workdir / 'start').touch()

  def _follow(self) -> list[Window]:
    """Changes the links between two rounds, and reads the counters then."""
    per_setting = self._plan.periods * self.config.fragments.count
    windows: list[Window] = []
    before: tuple[float, int, np.ndarray] | None = None
    for i in range(len(self._plan.settings) + 1):
      closed = self.config.fragments.count + i * per_setting
      secs = 60 + 3 * per_setting * self.slot_secs
      self._wait(lambda n=closed: len(self._rounds()) >= n, secs=secs)
      # Between two exchanges: the last one's answers are there by then.
      time.sleep(self.slot_secs / 4)
      rounds = self._rounds()
      now = time.time(), len(rounds), np.array(self._rig.num_bytes()).sum(0)
      if before is not None:
        windows.append(
          Window(
            before[0],
            now[0],
            rounds[before[1] :],
            *(now[2] - before[2]).tolist(),
          )
        )
      before = now
      if i < len(self._plan.settings):
        self._set_links(self._plan.settings[i])
    if self.config.fragments.count == 1:
      # Islands compute after the last exchange: its end is known.
      time.sleep(3 * self.step_secs)
    return windows

  def _found(
    self, window: Window, setting: Setting, *, first: int
  ) -> dict[str, Any]:
    shares = [self._share(name, window, first=first) for name in self._names]
    shapes_P = [
      fragment_codec.shapes_of(x)
      for x in shared_model.cut(
        self.config, shared_model.initial_params(self.config)
      )
    ]
    up = fragment_codec.Codec(self.config.compression, shapes_P)
    down = fragment_codec.Codec(self.config.down_compression, shapes_P)
    expected_up = sum(
      up.num_bytes(x['fragment']) * len(x['updates']) for x in window.rounds
    )
    expected_down = sum(
      down.num_bytes(x['fragment']) * len(x['updates']) for x in window.rounds
    )
    planned = (window.end - window.start) / self.slot_secs
    return {
      'utilisation': 100 * statistics.mean(shares),
      'utilisation_by_island': [100 * x for x in shares],
      'rounds': len(window.rounds),
      'rounds_kept': len(window.rounds) / planned,
      'bytes_sent': window.sent,
      'bytes_sent_expected': expected_up,
      'bytes_received': window.received,
      'bytes_received_expected': expected_down,
      'bytes_error': max(
        abs(window.sent / expected_up - 1),
        abs(window.received / expected_down - 1),
      ),
      'mbit_per_sec': self._link_bits(setting) / 1e6,
    }

  def _share(self, name: str, window: Window, *, first: int) -> float:
    """Share of the time in which an island computed."""
    text = (self._workdir / name / wan_stand_in.STEPS).read_text()
    steps = np.array([line.split() for line in text.splitlines()], float)
    if self.config.fragments.count == 1:
      # Steps and waits follow each other: whole rounds, to the next's start.
      period = self.config.sync_period
      begin, end = first * period, (first + self._plan.periods) * period
      whole = steps[end, 0] - steps[begin, 0]
      steps = steps[begin:end]
    else:
      steps = steps[(steps[:, 0] >= window.start) & (steps[:, 0] < window.end)]
      whole = steps[-1, 1] - steps[0, 0]
    return float((steps[:, 1] - steps[:, 0]).sum() / whole)

  def _set_links(self, setting: Setting) -> None:
    hub = cities.find(_HUB_CITY)
    for i in range(self._plan.islands):
      city = cities.find(setting.cities[i % len(setting.cities)])
      secs = cities.round_trip_secs(city, hub) / self._plan.dilation
      self._rig.set_link(i, wan_links.Link(self._link_bits(setting), secs))

  def _link_bits(self, setting: Setting) -> float:
    scale = self.num_params / _NUM_PARAMS * self._plan.dilation
    return setting.bits_per_sec / _RING_SHARE * scale

  def _rounds(self) -> list[dict[str, Any]]:
    """Closed so far."""
    path = self._workdir / 'hub' / 'rounds.jsonl'
    if not path.exists():
      return []
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [x for x in found if 'updates' in x]

  def _run(self, island: int | None, module: str, *arguments: str) -> None:
    name = 'hub' if island is None else self._names[island]
    (self._workdir / name).mkdir()
    with (self._workdir / name / 'log.txt').open('wb') as log:
      self._processes.append(
        subprocess.Popen(
          self._rig.inside(island, [sys.executable, '-m', module, *arguments]),
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=subprocess.STDOUT,
        )
      )

  def _wait(self, condition: Callable[[], bool], *, secs: float) -> None:
    end = time.monotonic() + secs
    while not condition():
      names = ['hub', *self._names]
      for name, process in zip(names, self._processes, strict=True):
        if process.poll() is not None or time.monotonic() > end:
          log = (self._workdir / name / 'log.txt').read_text()[-2000:]
          raise RuntimeError(f'{name} has ended or is late:\n{log}')
      time.sleep(0.1)


def main(arguments: Sequence[str] | None = None) -> None:
  """Measures and records, or says why it cannot."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='a minute')
  values = parser.parse_args(arguments)
  plan = Plan(_SETTINGS, islands=8, dilation=20.0, periods=1)
  if values.quick:
    plan = Plan(_SETTINGS[-1:], islands=3, dilation=200.0, periods=1)
  found: dict[str, dict[str, Any]] = {}
  try:
    flower_programs.check_installed()
    with wan_links.Rig(plan.islands) as rig:
      delay = rig.delay
      for arm in _ARMS:
        with tempfile.TemporaryDirectory() as folder:
          run = Run(rig, arm, plan, pathlib.Path(folder))
          names = [setting.name for setting in plan.settings]
          found[arm] = dict(zip(names, run.measure(), strict=True))
          print(json.dumps({arm: found[arm]}), file=sys.stderr, flush=True)
  except (wan_links.UnavailableError, ValueError) as error:
    print(f'skipped: {error}')
    return
  result = summary(found, plan, num_params=run.num_params, delay=delay)
  harness.record(
    'wan_utilisation_quick' if values.quick else 'wan_utilisation', result
  )


def summary(
  found: dict[str, dict[str, Any]], plan: Plan, *, num_params: int, delay: str
) -> dict[str, Any]:
  """What is recorded.

  Args:
    found: By arm and setting.
    plan: What was measured.
    num_params: Of the model.
    delay: What makes the delay of links.
  """
  published = {x.name: x.published for x in plan.settings}
  errors = {
    name: found['blocking_int8'][name]['utilisation'] - published[name]
    for name in published
  }
  streaming = [x['utilisation'] for x in found['streaming_int4'].values()]
  return {
    'blocking_error_points': max(abs(x) for x in errors.values()),
    'streaming_int4_min': min(streaming),
    'bytes_error': max(
      x['bytes_error'] for arm in found.values() for x in arm.values()
    ),
    **{
      arm: {name: x['utilisation'] for name, x in rows.items()}
      for arm, rows in found.items()
    },
    'published': published,
    'errors_points': errors,
    'details': found,
    'islands': plan.islands,
    'dilation': plan.dilation,
    'periods': plan.periods,
    'num_params': num_params,
    'delay': delay,
    'congestion_control': pathlib.Path(
      '/proc/sys/net/ipv4/tcp_congestion_control'
    )
    .read_text()
    .strip(),
    'training': 'a stand-in that sleeps',
    'seed': 0,
  }


if __name__ == '__main__':
  main()
