"""One of several processes of a small run of reinforcement learning.

python -m tests.tlt.hosts_process INDEX COUNT PORT OPTIONS

Leaves the answers of each step in the working directory, and says at the end
which drafter it has, or what went wrong.
"""

import dataclasses
import json
import pathlib
import sys
import time
import zlib
from typing import Any
from unittest import mock

import jax
import numpy as np

from efficient_llm.tlt import rewards, rollout_worker, train, trainer
from tests.tlt import small_run


def run(index: int, count: int, port: str, options: dict[str, Any]) -> None:
  """Trains as `experiments.tlt` does, on as many devices in all."""
  jax.config.update('jax_num_cpu_devices', options['num_devices'] // count)
  if count > 1:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(
      f'127.0.0.1:{port}', num_processes=count, process_id=index
    )
  workdir = pathlib.Path(options['workdir'])
  _record_answers(workdir, index)
  if index == options.get('slow_process'):
    _answer_late()
  function = 'num_characters'
  if index == options.get('failing_process'):
    function = _fail(options['failure'])
  config = small_run.config(
    checkpoint=options['checkpoint'],
    first_drafter=options['drafter'],
    loop=small_run.loop_config(options['num_steps'], every=1),
    reward=rewards.RewardConfig(f'tests.tlt.reward_functions:{function}'),
    process_timeout_secs=options.get('timeout_secs', 60.0),
  )
  config = dataclasses.replace(
    config,
    rollout=dataclasses.replace(config.rollout, **options.get('rollout', {})),
    drafter=dataclasses.replace(config.drafter, **options.get('spot', {})),
  )
  try:
    outcome = train.train(config, workdir=workdir)
  except (RuntimeError, ValueError) as error:
    print(f'answer: {type(error).__name__}: {error}', flush=True)
    return
  print(f'answer: drafter {_digest(outcome.state.drafter)}', flush=True)


def _record_answers(workdir: pathlib.Path, index: int) -> None:
  step = trainer.Trainer.step

  def recorded(self: Any, state: Any, batch: Any) -> Any:
    done = step(self, state, batch)
    answers = self.last_outcome
    np.savez(
      workdir / f'answers-{batch["step"]}-{index}.npz',
      tokens=answers.tokens_NT,
      lengths=answers.lengths_N,
      log_probs=answers.log_probs_NT,
    )
    return done

  mock.patch.object(trainer.Trainer, 'step', recorded).start()


def _answer_late() -> None:
  answer = rollout_worker.Worker.answer

  def late(self: Any, shared: Any) -> Any:
    time.sleep(2.0)
    return answer(self, shared)

  mock.patch.object(rollout_worker.Worker, 'answer', late).start()


def _fail(how: str) -> str:
  """Makes this process fail so; gives the reward function it has then."""

  def fail(*_: Any) -> Any:
    raise RuntimeError('no room')

  def hang(*_: Any) -> Any:
    time.sleep(600)

  if how in ('worker', 'hang'):
    answer = fail if how == 'worker' else hang
    mock.patch.object(rollout_worker.Worker, 'answer', answer).start()
  return {'reward': 'nothing', 'start': 'absent'}.get(how, 'num_characters')


def _digest(tree: Any) -> int:
  total = 0
  for leaf in jax.tree.leaves(jax.device_get(tree)):
    total = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), total)
  return total


if __name__ == '__main__':
  run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
