"""Six islands and everything that may go wrong, in simulated time.

python -m benchmarks.wan_chaos_simulated [--quick]

The hub, its checkpoints, the messages, their encoding and the islands' side of
the conversation are the real ones. Time, the network and the training are not:
an island's step moves its parameters towards a point that all look for, with
noise of its own, so that a loss can be told. Faults come at random, every 15
seconds on average. What Flower and the operating system do about them is not
in it; see benchmarks.wan_chaos.

Over 300 lines: one simulated world, which is read from top to bottom.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import harness
from efficient_llm.data import pipeline
from efficient_llm.diloco import compression, outer, screening
from efficient_llm.diloco.wan import exchange as exchange_lib
from efficient_llm.diloco.wan import fragment_codec, shared_model
from efficient_llm.diloco.wan import hub as hub_lib
from efficient_llm.diloco.wan.config import IslandsConfig, RoundConfig
from efficient_llm.diloco.wan.fragment_codec import Fragment
from efficient_llm.models import transformer
from efficient_llm.training import checkpoint, loop

_TICK_SECS = 0.25
FAULT_EVERY_SECS = 15.0
_LATENCY_SECS = 0.5
_STEPS_PER_SEC = 4.0
_PERIOD = 12
_TOKENS_PER_STEP = 64.0
_LEARNING_RATE, _NOISE = 0.02, 0.05
# By what an island's move is multiplied to make a bad update.
FACTORS = {'nan': float('nan'), 'times 100': 100.0, 'sign': -1.0}
BAD = (*FACTORS, 'replay')
FAULTS = (*BAD, 'kill', 'stop', 'link', 'hub', 'stranger')
_NAMES = tuple('abcdef')


def _config(secs: float) -> IslandsConfig:
  small = compression.CompressionConfig(format='int4')
  return IslandsConfig(
    model=transformer.TransformerConfig(
      vocab_size=32, num_layers=1, embed_dim=16, num_heads=2, max_positions=64
    ),
    data=pipeline.DataConfig(sequence_length=32),
    loop=loop.LoopConfig(
      # Undisturbed, about as many as fit in the time.
      num_steps=int(secs * _STEPS_PER_SEC * 0.8) // _PERIOD * _PERIOD,
      checkpoint=checkpoint.CheckpointConfig(every_steps=1, asynchronous=False),
    ),
    islands=len(_NAMES),
    sync_period=_PERIOD,
    outer=outer.OuterConfig(learning_rate=0.7, momentum=0.5),
    compression=small,
    down_compression=small,
    screening=screening.ScreeningConfig(min_cosine=0.0),
    rounds=RoundConfig(
      grace_secs=2.0,
      deadline_secs=20.0,
      patience_secs=15.0,
      match_speeds=False,
    ),
  )


@dataclasses.dataclass
class _Island:
  """One island: its parameters, its side, and what is wrong with it.

  Attributes:
    exchange: With the hub.
    own_P: Its parameters.
    sent_own: Those of the fragment under way.
    random: Of its noise.
    orders: What it was last told.
    has_message: Whether a message of the hub waits for its answer.
    bad: What its next update is spoilt by.
    dead_until: It is killed, or stopped, or cut off.
  """

  exchange: exchange_lib.Exchange
  own_P: list[Fragment]
  random: np.random.Generator
  sent_own: Fragment | None = None
  orders: exchange_lib.Orders | None = None
  has_message: bool = False
  position: int = 0
  steps: int = 0
  credit: float = 0.0
  bad: str = ''
  last_frame: bytes = b''
  killed_until: float = 0.0
  stopped_until: float = 0.0
  cut_until: float = 0.0


class _World:
  """A run in simulated time.

  Args:
    config: The run.
    workdir: Of the hub.
    has_faults: Whether anything goes wrong.
  """

  def __init__(
    self, config: IslandsConfig, workdir: pathlib.Path, *, has_faults: bool
  ):
    self._config, self._workdir = config, workdir
    self.now = 0.0
    self._random = np.random.default_rng(0)
    self.faults: dict[str, int] = dict.fromkeys(FAULTS, 0)
    self.bad_sent: set[tuple[str, int]] = set()
    self._next_fault = self._pause() if has_faults else float('inf')
    self._hub_back: float | None = None
    self._post: list[tuple[float, str, bool, bytes]] = []
    self._start = shared_model.cut(config, shared_model.initial_params(config))
    random = np.random.default_rng(1)
    self._target = [
      {
        name: (x + random.normal(size=x.shape)).astype(np.float32)
        for name, x in part.items()
      }
      for part in self._start
    ]
    self.hub = self._new_hub()
    self.islands = {name: self._new_island(i) for i, name in enumerate(_NAMES)}
    for name in _NAMES:
      self.hub.appeared(name)

  def run(self) -> None:
    """Until all rounds are done."""
    while not self.hub.is_done:
      self.now += _TICK_SECS
      if self.now > self._next_fault:
        self._next_fault = self.now + self._pause()
        self._do_harm()
      self._revive()
      self._deliver()
      for name in _NAMES:
        self._work(name)
      if self._hub_back is None:
        self._run_hub()
    self.hub.close()

  def loss(self) -> float:
    """Mean squared distance of what is shared from what is looked for."""
    found = [
      np.square(self.hub.shared.theta_P[p][name] - x).ravel()
      for p, part in enumerate(self._target)
      for name, x in part.items()
    ]
    return float(np.concatenate(found).mean())

  def _pause(self) -> float:
    return float(self._random.exponential(FAULT_EVERY_SECS))

  def _new_hub(self) -> hub_lib.Hub:
    return hub_lib.Hub(self._config, self._workdir, clock=lambda: self.now)

  def _new_island(self, seed: int) -> _Island:
    return _Island(
      exchange_lib.Exchange(self._config, self._start),
      [dict(part) for part in self._start],
      np.random.default_rng([seed, int(self.now * 4)]),
    )

  def _do_harm(self) -> None:
    kind = FAULTS[self._random.integers(len(FAULTS))]
    name = _NAMES[self._random.integers(len(_NAMES))]
    island = self.islands[name]
    self.faults[kind] += 1
    if kind in BAD:
      island.bad = kind
    elif kind == 'kill':
      island.killed_until = self.now + 8.0
      self.hub.vanished(name)
    elif kind == 'stop':
      island.stopped_until = self.now + 10.0
    elif kind == 'link':
      island.cut_until = self.now + 10.0
    elif kind == 'hub':
      self._hub_back = self.now + 5.0
      self._post = []
    else:
      self.hub.receive('stranger', island.last_frame)

  def _revive(self) -> None:
    if self._hub_back is not None and self.now >= self._hub_back:
      self.hub, self._hub_back = self._new_hub(), None
      for name, island in self.islands.items():
        if not island.killed_until:
          self.hub.appeared(name)
    for i, (name, island) in enumerate(self.islands.items()):
      is_back = island.killed_until and self.now >= island.killed_until
      if is_back and self._hub_back is None:
        self.islands[name] = self._new_island(i)
        self.hub.appeared(name)

  def _deliver(self) -> None:
    due = [x for x in self._post if x[0] <= self.now]
    self._post = [x for x in self._post if x[0] > self.now]
    for _, name, is_up, frame in due:
      island = self.islands[name]
      if self.now < island.cut_until or island.killed_until:
        continue
      if is_up:
        if self._hub_back is None:
          self.hub.receive(name, frame)
      else:
        self._hear(name, island, frame)

  def _hear(self, name: str, island: _Island, frame: bytes) -> None:
    orders = island.exchange.take(frame, position=island.position)
    if orders.kind == 'greet':
      self._say(name, island.exchange.hello(self._signs(island)))
      return
    before_P = list(island.own_P)
    if island.orders is None:
      island.position = orders.position
      island.exchange.begin_at(orders.position)
      island.own_P = [dict(part) for part in island.exchange.theta_P]
    sent, island.sent_own = island.sent_own, None
    for p, values in orders.parts:
      island.own_P[p] = dict(values)
      if sent is not None and not orders.adopts_all:
        own = before_P[p]
        island.own_P[p] = {x: values[x] + own[x] - sent[x] for x in values}
    island.orders, island.has_message = orders, True

  def _say(self, name: str, frame: bytes) -> None:
    self._post.append((self.now + _LATENCY_SECS, name, True, frame))

  def _work(self, name: str) -> None:
    island = self.islands[name]
    if island.killed_until or self.now < island.stopped_until:
      return
    orders = island.orders
    if orders is None:
      return
    is_blocked = island.exchange.awaits_answer and self._hub_back is None
    if not is_blocked:
      island.credit += _STEPS_PER_SEC * _TICK_SECS
    while island.credit >= 1.0:
      island.credit -= 1.0
      self._step(island)
    if island.exchange.since_sent >= orders.steps and island.has_message:
      self._send(name, island, orders.fragment)

  def _step(self, island: _Island) -> None:
    for p, part in enumerate(island.own_P):
      for leaf, x in part.items():
        noise = island.random.normal(size=x.shape)
        move = x - self._target[p][leaf] + _NOISE * noise
        part[leaf] = (x - _LEARNING_RATE * move).astype(np.float32)
    island.exchange.trained(_TOKENS_PER_STEP)
    island.position += 1
    island.steps += 1

  def _send(self, name: str, island: _Island, fragment: int) -> None:
    theta = island.exchange.theta_P[fragment]
    island.sent_own = dict(island.own_P[fragment])
    factor = FACTORS.get(island.bad, 1.0)
    own = {
      leaf: theta[leaf] + np.float32(factor) * (x - theta[leaf])
      for leaf, x in island.own_P[fragment].items()
    }
    frame = island.exchange.update(
      fragment, own, position=island.position, signs=self._signs(island)
    )
    if island.bad == 'replay' and island.last_frame:
      self._say(name, island.last_frame)
    else:
      if island.bad in FACTORS:
        self.bad_sent.add((name, island.position))
      self._say(name, frame)
      island.last_frame = frame
    island.bad, island.has_message = '', False

  def _signs(self, island: _Island) -> dict[str, Any]:
    return {
      'step': island.steps,
      'loss': None,
      'speed': _STEPS_PER_SEC,
      'spans': [],
      'clock': self.now,
    }

  def _run_hub(self) -> None:
    while self.hub.tick():
      pass
    for name in self.hub.silent():
      self.hub.vanished(name)
      self.hub.appeared(name)
    for name in _NAMES:
      frame = self.hub.next_message(name)
      if frame is not None:
        self._post.append((self.now + _LATENCY_SECS, name, False, frame))


def counted(workdir: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Fragment and update, of the rounds that stand after all restarts."""
  rounds: dict[int, dict[str, Any]] = {}
  for line in (workdir / 'rounds.jsonl').read_text().splitlines():
    found = json.loads(line)
    if 'restored' in found:
      rounds = {k: x for k, x in rounds.items() if k < found['restored']}
    elif 'updates' in found:
      rounds[found['slot']] = found
  for _, line in sorted(rounds.items()):
    for update in line['updates']:
      if update['weight'] > 0:
        yield line['fragment'], update


def tokens_twice(workdir: pathlib.Path, *, tokens_per_batch: float) -> float:
  """Tokens of batches that are in two updates of a fragment, by the log."""
  seen: dict[tuple[str, int], set[int]] = {}
  twice = 0
  for fragment, update in counted(workdir):
    batches = set(range(update['first'], update['last']))
    known = seen.setdefault((update['island'], fragment), set())
    twice += len(batches & known)
    known |= batches
  return twice * tokens_per_batch


def _measure(secs: float) -> dict[str, Any]:
  config = _config(secs)
  config.validate()
  with tempfile.TemporaryDirectory() as folder:
    worlds = {}
    for kind in ('calm', 'storm'):
      workdir = pathlib.Path(folder, kind)
      workdir.mkdir()
      world = _World(config, workdir, has_faults=kind == 'storm')
      world.run()
      worlds[kind] = world
    storm, calm = worlds['storm'], worlds['calm']
    workdir = pathlib.Path(folder, 'storm')
    accepted = {(x['island'], x['last']) for _, x in counted(workdir)}
    rates = {kind: x.hub.tokens / x.now for kind, x in worlds.items()}
    digests = [fragment_codec.digest(x) for x in storm.hub.shared.theta_P]
    return {
      'simulated_secs': storm.now,
      'faults': sum(storm.faults.values()),
      'faults_by_kind': storm.faults,
      'rounds': storm.hub.slot,
      'rounds_reopened': storm.hub.counts['reopened'],
      # Each is to move its fragment.
      'rounds_lost': storm.hub.slot - sum(storm.hub.shared.versions_P),
      'tokens_double_counted': tokens_twice(
        workdir, tokens_per_batch=_TOKENS_PER_STEP
      ),
      'bad_updates_sent': len(storm.bad_sent),
      'bad_updates_accepted': len(storm.bad_sent & accepted),
      'digest_mismatches': storm.hub.counts['digest_mismatches'],
      'step_efficiency': rates['storm'] / rates['calm'],
      'final_loss': storm.loss(),
      'final_loss_ratio': storm.loss() / calm.loss(),
      'digests': digests,
    }


def main() -> None:
  """Measures and records."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='90 s, not 600')
  quick = parser.parse_args().quick
  name = f'wan_chaos_simulated{"_quick" if quick else ""}'
  harness.record(name, _measure(90.0 if quick else 600.0))


if __name__ == '__main__':
  main()
