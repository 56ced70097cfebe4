"""An island that trains, and lies when it is told to.

    python -m benchmarks.wan_chaos_island --hub=HOST:PORT --key=FILE \
        --workdir=DIR --config=benchmarks/wan_runs.py:chaos --share=0/6 \
        --step_secs=0.25

It is `experiments.island` but for two things: a step takes a given time, of
which the training is the first part, as six machines do not fit two cores; and
where the file `bad` is put into its folder, its next update is what that says.
"""

import pathlib
import time
from typing import Any

import numpy as np
from absl import flags

from benchmarks import wan_chaos_simulated
from efficient_llm.data import iterator, pipeline
from efficient_llm.diloco.wan import exchange as exchange_lib
from efficient_llm.diloco.wan import shared_model
from efficient_llm.diloco.wan import trainer as trainer_lib
from efficient_llm.diloco.wan.config import IslandsConfig
from efficient_llm.diloco.wan.fragment_codec import Fragment
from experiments import exits, hub_link, island, runner

READY, BAD, BAD_SENT = 'ready', 'bad', 'bad_sent.txt'
_PAUSE_SECS = 0.02


class Trainer(trainer_lib.Trainer):
  """Makes real steps, each of which takes a given time.

  Args:
    config: The run.
    batches: Of the island's own data.
    workdir: Where it says that it is ready.
    step_secs: Of a step.
    start: The first step waits for this file.
  """

  def __init__(
    self,
    config: IslandsConfig,
    batches: iterator.BatchIterator,
    *,
    workdir: pathlib.Path,
    step_secs: float,
    start: pathlib.Path,
  ):
    super().__init__(config, batches)
    # Compiles all, so that the first step takes no longer than others.
    super().step(0)
    for p in range(config.fragments.count):
      self.put(p, self.own(p), mixing=0.5)
    self._state, self._at = self._program.init_state(), 0
    self._workdir, self._step_secs, self._start = workdir, step_secs, start

  def begin(self, position: int) -> None:
    """Says that it could begin, and waits for the others."""
    super().begin(position)
    (self._workdir / READY).touch()
    while not self._start.exists():
      time.sleep(_PAUSE_SECS)

  def step(self, at: int) -> trainer_lib.Step:
    """A step, and a pause until its time is over."""
    end = time.monotonic() + self._step_secs
    found = super().step(at)
    time.sleep(max(0.0, end - time.monotonic()))
    return found


class Exchange(exchange_lib.Exchange):
  """The island's side, whose updates can be spoilt.

  Args:
    config: The run.
    theta_P: Initial parameters by fragment.
    workdir: Where it is told to.
  """

  def __init__(
    self, config: IslandsConfig, theta_P: list[Fragment], workdir: pathlib.Path
  ):
    super().__init__(config, theta_P)
    self._workdir = workdir
    self._last: bytes | None = None

  def update(
    self,
    fragment: int,
    own: Fragment,
    *,
    position: int,
    signs: dict[str, Any],
  ) -> bytes:
    """The update, or what is sent in its place."""
    bad = self._told()
    factor = np.float32(wan_chaos_simulated.FACTORS.get(bad, 1.0))
    own = (
      {
        name: theta + factor * (own[name] - theta)
        for name, theta in self.theta_P[fragment].items()
      }
      if bad
      else own
    )
    frame = super().update(fragment, own, position=position, signs=signs)
    if bad:
      with (self._workdir / BAD_SENT).open('a', encoding='utf-8') as file:
        file.write(f'{bad},{position}\n')
    if bad == 'replay':
      frame = self._last or frame
    self._last = frame
    return frame

  def _told(self) -> str:
    """What to do to this update; nothing to be replayed is no replay."""
    path = self._workdir / BAD
    if not path.exists():
      return ''
    bad = path.read_text(encoding='utf-8')
    if bad == 'replay' and self._last is None:
      return ''
    path.unlink()
    return bad


def run(config: IslandsConfig, workdir: pathlib.Path) -> int:
  """Is an island until the hub says stop."""
  values = flags.FLAGS
  target = hub_link.Target.from_flags(
    hub=values.hub, key=values.key, authority=None
  )
  dataset = pipeline.open_dataset(
    config.data, split='train', cache_dir=workdir.parent / 'cache'
  )
  index, _, count = values.share.partition('/')
  trainer = Trainer(
    config,
    dataset.iterate(island=(int(index), int(count))),
    workdir=workdir,
    step_secs=values.step_secs,
    start=pathlib.Path(values.start),
  )
  start = shared_model.cut(config, shared_model.initial_params(config))
  exchange = Exchange(config, start, workdir)
  island.train(config, trainer, target, workdir=workdir, exchange=exchange)
  return exits.DONE


if __name__ == '__main__':
  flags.DEFINE_string('hub', None, 'HOST:PORT of the hub.')
  flags.DEFINE_string('key', None, "The island's private key.")
  flags.DEFINE_string('share', '0/1', 'I/N: part I of N of the data.')
  flags.DEFINE_float('step_secs', 0.25, 'Of a step.')
  flags.DEFINE_string('start', None, 'File that the first step waits for.')
  runner.main(
    run,
    default_config='benchmarks/wan_runs.py:chaos',
    config_type=IslandsConfig,
    workdir='out/chaos_island',
  )
