"""An island whose training is a stand-in: it sleeps as long as its steps take.

    python -m benchmarks.wan_stand_in --hub=HOST:PORT --key=FILE --workdir=DIR \
        --config=benchmarks/wan_runs.py:blocking_int8 --step_secs=0.4

All else is an island's own: its side of the conversation, encoding and link.
What it sends is not nothing: its parameters move towards a point that all
islands look for, with noise of its own, as those of a training would.
"""

import pathlib
import time

import numpy as np
from absl import flags

from efficient_llm.diloco.wan import shared_model
from efficient_llm.diloco.wan import trainer as trainer_lib
from efficient_llm.diloco.wan.config import IslandsConfig
from efficient_llm.diloco.wan.fragment_codec import Fragment
from experiments import exits, hub_link, island, runner

STEPS, READY = 'steps.txt', 'ready'
_TOKENS = 128.0
_RATE, _NOISE = 0.02, 0.05
_PAUSE_SECS = 0.02


class StandIn:
  """Makes steps that only take time.

  Args:
    config: The run.
    workdir: For a line with start and end of each step.
    seed: Of the noise.
    step_secs: Of a step.
    fast_steps: So many at first take a tenth, to warm up.
    start: The first step waits for this file; None for nothing.
  """

  def __init__(
    self,
    config: IslandsConfig,
    workdir: pathlib.Path,
    *,
    seed: int,
    step_secs: float,
    fast_steps: int,
    start: pathlib.Path | None,
  ):
    self._workdir, self._start = workdir, start
    self._step_secs, self._fast_steps = step_secs, fast_steps
    params = shared_model.initial_params(config)
    self._own_P = shared_model.cut(config, params)
    self._pending_P = [0] * len(self._own_P)
    self._target_P = _target(self._own_P)
    self._random = np.random.default_rng(seed)
    self._steps = self._position = 0

  @property
  def position(self) -> int:
    """The batch after the last one."""
    return self._position

  def begin(self, position: int) -> None:
    """Says that it could begin, and waits for the others."""
    self._position = position
    (self._workdir / READY).touch()
    while self._start is not None and not self._start.exists():
      time.sleep(_PAUSE_SECS)

  def step(self, at: int) -> trainer_lib.Step:
    """Sleeps, and notes when."""
    del at
    start = time.time()
    is_fast = self._steps < self._fast_steps
    time.sleep(self._step_secs / 10 if is_fast else self._step_secs)
    self._steps += 1
    self._position += 1
    self._pending_P = [steps + 1 for steps in self._pending_P]
    with (self._workdir / STEPS).open('a', encoding='utf-8') as file:
      file.write(f'{start} {time.time()}\n')
    return trainer_lib.Step(None, _TOKENS)

  def own(self, fragment: int) -> Fragment:
    """Where its steps have led it."""
    steps, self._pending_P[fragment] = self._pending_P[fragment], 0
    if steps:
      self._own_P[fragment] = {
        name: _moved(x, self._target_P[fragment][name], steps, self._random)
        for name, x in self._own_P[fragment].items()
      }
    return self._own_P[fragment]

  def put(
    self,
    fragment: int,
    values: Fragment,
    *,
    mixing: float,
    since: Fragment | None = None,
  ) -> None:
    """Takes the shared parameters, and a share of its own since then."""
    if mixing:
      own, kept = self.own(fragment), np.float32(mixing)
      since = values if since is None else since
      values = {
        name: x + kept * (own[name] - since[name]) for name, x in values.items()
      }
    self._pending_P[fragment] = 0
    self._own_P[fragment] = values


def _target(theta_P: list[Fragment]) -> list[Fragment]:
  """The point that all islands look for."""
  random = np.random.default_rng(1)
  return [
    {
      name: x + random.standard_normal(x.shape, np.float32)
      for name, x in part.items()
    }
    for part in theta_P
  ]


def _moved(
  x: np.ndarray, wanted: np.ndarray, steps: int, random: np.random.Generator
) -> np.ndarray:
  """Where so many steps lead at once, each of a part of the way and noise."""
  kept = (1 - _RATE) ** np.arange(steps + 1)
  spread = _RATE * _NOISE * np.sqrt(np.square(kept[:-1]).sum())
  noise = random.standard_normal(x.shape, np.float32)
  moved = wanted + np.float32(kept[-1]) * (x - wanted)
  return moved + np.float32(spread) * noise


def run(config: IslandsConfig, workdir: pathlib.Path) -> int:
  """Is an island until the hub says stop."""
  values = flags.FLAGS
  target_hub = hub_link.Target.from_flags(
    hub=values.hub, key=values.key, authority=None
  )
  trainer = StandIn(
    config,
    workdir,
    seed=values.seed,
    step_secs=values.step_secs,
    fast_steps=values.fast_steps,
    start=pathlib.Path(values.start) if values.start else None,
  )
  island.train(config, trainer, target_hub, workdir=workdir)
  return exits.DONE


if __name__ == '__main__':
  flags.DEFINE_string('hub', None, 'HOST:PORT of the hub.')
  flags.DEFINE_string('key', None, "The island's private key.")
  flags.DEFINE_integer('seed', 0, 'Of its noise.')
  flags.DEFINE_float('step_secs', 0.4, 'Of a step.')
  flags.DEFINE_integer('fast_steps', 0, 'So many at first take a tenth.')
  flags.DEFINE_string('start', None, 'File that the first step waits for.')
  runner.main(
    run,
    default_config='benchmarks/wan_runs.py:blocking_int8',
    config_type=IslandsConfig,
    workdir='out/stand_in',
  )
