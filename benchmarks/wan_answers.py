"""What islands do with an answer that comes late, and what it costs.

    ./run.sh python -m benchmarks.wan_answers [--quick]

Six islands train the 0.2 M parameters of `wan_runs.py:chaos` in one process;
hub, messages, islands and training are the real ones, time is not: an answer
comes a given number of steps after its update, the same in every arm. Islands
add what they have learned meanwhile to what the hub says ('keep'), weigh both
('mix', as Streaming DiLoCo does), or take the hub's alone ('take').
"""

import argparse
import dataclasses
import pathlib
import tempfile
import threading
from typing import Any

from benchmarks import harness, wan_chaos, wan_runs
from efficient_llm.data import pipeline
from efficient_llm.diloco.wan import hub as hub_lib
from efficient_llm.diloco.wan import island as island_lib
from efficient_llm.diloco.wan import trainer as trainer_lib
from efficient_llm.diloco.wan.config import IslandsConfig

_ARMS = {'keep': ('keep', 0.0), 'mix': ('mix', 0.5), 'take': ('mix', 0.0)}
_LATE = (4, 16)
_STEPS, _QUICK_STEPS = 1080, 80
_SEEDS = (0, 1)


class _Trainer(trainer_lib.Trainer):
  """Counts its steps."""

  num_steps = 0

  def step(self, at: int) -> trainer_lib.Step:
    self.num_steps += 1
    return super().step(at)


class _Link:
  """An island's link to a hub in the same process.

  Args:
    hub: It is used by one thread at a time.
    changed: Told of whenever the hub has heard something.
    name: Of the island.
    trainer: By whose steps time goes.
    late: Steps from an update to its answer.
  """

  def __init__(
    self,
    hub: hub_lib.Hub,
    changed: threading.Condition,
    name: str,
    trainer: _Trainer,
    late: int,
  ):
    self._hub, self._changed, self._name = hub, changed, name
    self._trainer, self._late = trainer, late
    self._due = 0
    self._is_asked = False

  def poll(self, secs: float = 0.0) -> bytes | None:
    """The hub's message, once so many steps are made."""
    del secs
    if self._is_asked or self._trainer.num_steps < self._due:
      return None
    with self._changed:
      while (frame := self._hub.next_message(self._name)) is None:
        self._changed.wait()
    self._is_asked = True
    return frame

  def claim(self) -> bool:
    """Whether the hub waits for an answer."""
    return self._is_asked

  def answer(self, frame: bytes) -> None:
    """Says something to the hub."""
    steps = self._trainer.num_steps
    self._due = steps + self._late if steps else 0
    self._is_asked = False
    with self._changed:
      self._hub.receive(self._name, frame)
      self._hub.tick()
      self._changed.notify_all()


def _train(config: IslandsConfig, late: int, folder: pathlib.Path) -> float:
  """Trains; gives the loss of the shared model on text none has read."""
  workdir = folder / 'hub'
  workdir.mkdir()
  hub = hub_lib.Hub(config, workdir, clock=lambda: 0.0)
  changed = threading.Condition()
  dataset = pipeline.open_dataset(
    config.data, split='train', cache_dir=folder.parent / 'cache'
  )
  threads = []
  names = [f'island-{i}' for i in range(config.islands)]
  # All before the first one trains, so that every round waits for all.
  for name in names:
    hub.appeared(name)
    hub.members[name].is_present = True
  for i, name in enumerate(names):
    batches = dataset.iterate(island=(i, config.islands))
    trainer = _Trainer(config, batches)
    island = island_lib.Island(config, trainer)
    link = _Link(hub, changed, name, trainer, late)
    threads.append(threading.Thread(target=island.run, args=(link,)))
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  hub.close()
  return wan_chaos.held_out_loss(config, workdir)


def _config(arm: str, seed: int, steps: int) -> IslandsConfig:
  config = wan_runs.get_config('chaos')
  on_answer, mixing = _ARMS[arm]
  config = dataclasses.replace(
    config,
    seed=seed,
    loop=dataclasses.replace(config.loop, num_steps=steps),
    rounds=dataclasses.replace(config.rounds, on_answer=on_answer),
    fragments=dataclasses.replace(config.fragments, mixing=mixing),
    # With a mixing good updates are against the rest.
    screening=dataclasses.replace(config.screening, min_cosine=None),
  )
  config.validate()
  return config


def main() -> None:
  """Measures and records."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='80 steps, one seed')
  quick = parser.parse_args().quick
  steps = _QUICK_STEPS if quick else _STEPS
  found: dict[str, Any] = {}
  with tempfile.TemporaryDirectory() as folder:
    for late in _LATE:
      for arm in _ARMS:
        losses = []
        for seed in _SEEDS[: 1 if quick else None]:
          run = pathlib.Path(folder, f'{late}_{arm}_{seed}')
          run.mkdir()
          losses.append(_train(_config(arm, seed, steps), late, run))
          print(f'{late} steps late, {arm}, seed {seed}: {losses[-1]:.4f}')
        found.setdefault(f'{late}_steps_late', {})[arm] = losses
  harness.record(
    'wan_answers_quick' if quick else 'wan_answers',
    {
      'losses': found,
      'steps': steps,
      'sync_period': wan_runs.get_config('chaos').sync_period,
      'islands': wan_runs.get_config('chaos').islands,
      'seeds': list(_SEEDS[: 1 if quick else None]),
    },
  )


if __name__ == '__main__':
  main()
