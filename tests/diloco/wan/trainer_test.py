import pathlib

import numpy as np
import pytest

from efficient_llm import optimizer
from efficient_llm.diloco.wan import trainer as trainer_lib
from tests import tiny
from tests.diloco.wan import local_run


@pytest.fixture
def trainer(tmp_path: pathlib.Path) -> trainer_lib.Trainer:
  config = local_run.config(
    tiny.write_text(tmp_path / 'text'),
    optimizer=optimizer.OptimizerConfig(
      warmup_steps=1, schedule='wsd', final_fraction=0.0
    ),
  )
  batches = local_run.batches(config, tmp_path / 'cache', share=(0, 1))
  return trainer_lib.Trainer(config, batches)


def test_the_learning_rate_follows_the_run_and_not_the_island(
  trainer: trainer_lib.Trainer,
) -> None:
  def moved(at: int) -> float:
    before = trainer.own(0)
    trainer.step(at)
    after = trainer.own(0)
    return max(float(np.abs(after[k] - x).max()) for k, x in before.items())

  first, last = 0, 12
  assert moved(first) == 0.0
  at_peak = moved(6)
  # At once: this island has not made the steps in between.
  assert moved(last) == 0.0
  assert moved(7) > 0.1 * at_peak > 0.0
  assert int(trainer._state.step) == 8
  assert trainer._program.train_step._cache_size() == 1


def test_what_was_learned_since_an_update_is_kept(
  trainer: trainer_lib.Trainer,
) -> None:
  start = trainer.own(0)
  trainer.step(5)
  sent = trainer.own(0)
  trainer.step(6)
  later = trainer.own(0)
  shared = {name: 2 * x for name, x in start.items()}
  trainer.put(0, shared, mixing=1.0, since=sent)
  for name, x in trainer.own(0).items():
    expected = shared[name] + later[name] - sent[name]
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
  trainer.put(0, shared, mixing=0.0)
  for name, x in trainer.own(0).items():
    np.testing.assert_array_equal(x, shared[name])
