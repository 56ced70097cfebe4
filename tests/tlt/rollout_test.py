"""Workers side by side answer every prompt once, whoever takes it.

Over 300 lines: all need the small policy and workers made here.
"""

import dataclasses
import functools
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm.models import presets, sampling, transformer
from efficient_llm.speculative import (
  drafter,
  drafter_loss,
  strategy_config,
)
from efficient_llm.tlt import (
  rollout,
  rollout_config,
  spot_config,
  spot_trainer,
  texts,
)

_CONFIG = presets.get('test', vocab_size=13, max_positions=64)
_ROLLOUT = rollout_config.RolloutConfig(
  num_prompts=3,
  group_size=2,
  max_live=2,
  rounds_at_once=2,
  num_texts=4,
  sampling=sampling.SamplingConfig(16),
  strategy=strategy_config.StrategyConfig(arms=('3_1_4',), thresholds=(1,)),
)
_PROMPTS = np.repeat(
  np.asarray([[1, 2, 3, 0], [4, 5, 0, 0], [6, 0, 0, 0]]), 2, 0
)
_LENGTHS = np.repeat([3, 2, 1], 2)
_GROUPS = np.repeat([0, 1, 2], 2)


@functools.lru_cache
def _params() -> Any:
  # Sharper than a fresh model, so that drafts are sometimes right.
  params = transformer.init(_CONFIG, jax.random.key(0))
  return jax.tree.map(lambda x: 2.0 * x if x.ndim > 1 else x, params)


def _draft_params() -> Any:
  return drafter.init(_CONFIG, jax.random.key(1), _params())


def _broken(params: Any) -> Any:
  return jax.tree.map(lambda x: np.full_like(x, np.nan), params)


def _trainer(**changes: Any) -> spot_trainer.SpotTrainer:
  config = spot_config.SpotConfig(
    batch_size=1,
    publish_every=1,
    loss=drafter_loss.DrafterLossConfig(num_passes=1),
  )
  trainer = spot_trainer.SpotTrainer(
    dataclasses.replace(config, **changes),
    _CONFIG,
    sequence_length=24,
    pad_id=0,
    seed=0,
  )
  trainer.restore(trainer.init_state(_draft_params()))
  return trainer


def _run(
  speculation: rollout_config.Speculation,
  num_workers: int,
  trainer: spot_trainer.SpotTrainer | None = None,
  **more: Any,
) -> rollout.Outcome:
  workers = rollout.Workers(
    dataclasses.replace(_ROLLOUT, speculation=speculation),
    _CONFIG,
    stop_tokens=(5,),
    devices=jax.devices()[:1] * num_workers,
  )
  return workers.run(
    _params(),
    _PROMPTS,
    _LENGTHS,
    _GROUPS,
    jax.random.key(2),
    trainer=trainer,
    **{'draft_params': _draft_params(), **more},
  )


@functools.lru_cache
def _plain() -> sampling.Completion:
  return sampling.generate(
    _CONFIG,
    _params(),
    np.asarray(_PROMPTS, np.int32),
    np.asarray(_LENGTHS, np.int32),
    sampling.SamplingConfig(16, stop_tokens=(5,)),
    jax.random.key(2),
  )


@pytest.mark.parametrize(
  ('speculation', 'num_workers'), [('off', 2), ('ngram', 2), ('union', 1)]
)
def test_answers_are_those_of_plain_decoding(
  speculation: rollout_config.Speculation, num_workers: int
) -> None:
  outcome = _run(speculation, num_workers)
  np.testing.assert_array_equal(outcome.tokens_NT, _plain().tokens)
  np.testing.assert_array_equal(outcome.lengths_N, _plain().lengths)
  np.testing.assert_allclose(
    outcome.log_probs_NT, _plain().log_probs, atol=1e-4
  )
  assert len(outcome.worker_secs) == num_workers
  assert outcome.idle_secs >= 0


def test_a_drafter_trained_meanwhile_changes_no_answer() -> None:
  trainer = _trainer()
  trainer.begin(_params())
  outcome = _run('union', 2, trainer)
  np.testing.assert_array_equal(outcome.tokens_NT, _plain().tokens)
  # All answers are there to learn from.
  saved = trainer.data.get_state()['texts'][-1]
  expected = sorted(
    _PROMPTS[n, : _LENGTHS[n]].tolist()
    + np.asarray(_plain().tokens[n, : _plain().lengths[n]]).tolist()
    for n in range(6)
  )
  assert sorted(saved) == expected


def test_a_worker_that_fails_ends_the_step_soon(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  trainer = _trainer()
  calls = []

  def fail_once(text: np.ndarray) -> None:
    calls.append(len(text))
    if len(calls) == 1:
      raise RuntimeError('no room')

  monkeypatch.setattr(trainer.data, 'add', fail_once)
  trainer.begin(_params())
  with pytest.raises(RuntimeError, match='no room'):
    _run('union', 2, trainer)
  # Of six answers the other had two under way.
  assert len(calls) <= 3


def test_the_newest_texts_stay() -> None:
  pool = texts.TextPool(2, 4)
  for group, tokens in enumerate(([1], [2, 2], [3, 3, 3])):
    pool.add(group, np.asarray(tokens))
  arrays = pool.arrays()
  assert arrays['extra_RE'][0].tolist() == [3, 3, 3, 0]
  assert arrays['extra_RE'][1].tolist() == [2, 2, 0, 0]
  assert arrays['extra_lengths_R'].tolist() == [3, 2]
  assert arrays['extra_group_ids_R'].tolist() == [2, 1]


@pytest.mark.parametrize(
  ('change', 'named'),
  [
    ({'group_size': 1}, 'group_size'),
    ({'max_live': 0}, 'max_live'),
    ({'max_rounds': 0}, 'max_rounds'),
    ({'max_kept_prompts': 0}, 'max_kept_prompts'),
    ({'finish_share': 0.0}, 'finish_share'),
    ({'finish_share': 1.5}, 'finish_share'),
    ({'unfinished': 'wait'}, 'finish_share below 1'),
    (
      {'unfinished': 'wait', 'finish_share': 0.5, 'max_rounds': 2},
      'max_rounds=1',
    ),
    (
      {'finish_share': 0.5, 'sampling': sampling.SamplingConfig(top_k=3)},
      'leave them None',
    ),
    ({'sampling': sampling.SamplingConfig(temperature=0.0)}, 'temperature'),
  ],
)
def test_bad_settings_are_named(change: dict[str, Any], named: str) -> None:
  with pytest.raises(ValueError, match=named):
    dataclasses.replace(_ROLLOUT, **change).validate()


class _Counting(threading.Event):
  """Is set once it has been asked for so many times."""

  def __init__(self, count: int) -> None:
    super().__init__()
    self.count = count

  def is_set(self) -> bool:
    self.count -= 1
    return self.count < 0


def test_training_stops_within_a_step() -> None:
  trainer = _trainer()
  trainer.begin(_params())
  trainer.data.add(np.asarray([1, 2, 3, 4, 5]))
  trainer.train_until(_Counting(3), jax.devices()[0])
  effort = trainer.take_effort()
  assert effort.num_steps == 3
  assert effort.num_published == trainer.version == 3
  assert trainer.staleness == 0
  assert 0 < effort.acceptance <= 1


def test_idle_time_is_not_spent_on_compilation(
  caplog: pytest.LogCaptureFixture,
) -> None:
  trainer, device = _trainer(), jax.devices()[0]
  trainer.compile(_params(), device)
  trainer.begin(_params())
  trainer.data.add(np.asarray([1, 2, 3, 4, 5]))
  with jax.log_compiles(), jax.default_device(device):
    trainer.train_until(_Counting(2), device)
  assert trainer.take_effort().num_steps == 2
  assert 'Compiling' not in caplog.text


class _Short(threading.Event):
  """Is set with whatever is done first."""

  asked = False

  def is_set(self) -> bool:
    before, self.asked = self.asked, True
    return before

  def wait(self, timeout: float | None = None) -> bool:
    del timeout
    return True


def test_nobody_waits_for_training_unless_it_is_overdue() -> None:
  trainer = _trainer(max_staleness=2)
  num_steps = []
  for _ in range(24):
    trainer.begin(_params())
    trainer.data.add(np.asarray([1, 2, 3, 4, 5]))
    trainer.train_until(_Short(), jax.devices()[0])
    num_steps.append(trainer.take_effort().num_steps)
  # From when on enough periods are known, about every third has a step.
  assert num_steps[:8] == [1] * 8
  later = ''.join(map(str, num_steps[8:]))
  assert '000' not in later
  assert sum(num_steps[8:]) < 12


def test_a_frozen_drafter_is_never_trained() -> None:
  trainer = _trainer(mode='frozen')
  trainer.begin(_params())
  trainer.data.add(np.asarray([1, 2, 3, 4, 5]))
  trainer.train_until(_Counting(3), jax.devices()[0])
  assert trainer.take_effort().num_steps == 0
  assert (trainer.version, trainer.staleness) == (0, 1)


def test_one_worker_trains_at_a_time() -> None:
  trainer = _trainer()
  trainer.begin(_params())
  ended = threading.Event()
  first = threading.Thread(
    target=trainer.train_until, args=(ended, jax.devices()[0])
  )
  first.start()
  time.sleep(0.1)
  # Without answers the first waits; the second does not.
  trainer.train_until(ended, jax.devices()[0])
  assert first.is_alive()
  ended.set()
  first.join()


def test_long_answers_of_the_step_before_are_learnt_from() -> None:
  trainer = _trainer(batch_size=4)
  trainer.begin(_params())
  trainer.data.add(np.full(20, 7))
  trainer.data.add(np.full(3, 8))
  trainer.begin(_params())
  trainer.data.add(np.full(5, 9))
  batch = trainer.data.batch()
  assert batch is not None
  held = set(np.unique(batch['tokens'][batch['segment_ids'] > 0]))
  assert held == {7, 9}
  # A step later they are forgotten.
  trainer.begin(_params())
  batch = trainer.data.batch()
  assert batch is not None
  assert set(np.unique(batch['tokens'][batch['segment_ids'] > 0])) == {9}


@pytest.mark.parametrize(
  'speculation', ['learned', pytest.param('union', marks=pytest.mark.slow)]
)
def test_answers_need_no_sound_drafter(
  speculation: rollout_config.Speculation,
) -> None:
  outcome = _run(
    speculation, 1, draft_params=_broken(_draft_params()), use_model=False
  )
  np.testing.assert_array_equal(outcome.tokens_NT, _plain().tokens)
  assert set(outcome.rounds_by_shape) == {'0_1_1'}


def test_a_drafter_that_is_lost_midway_is_used_no_more() -> None:
  trainer = _trainer(mode='frozen')
  trainer.is_healthy = False
  trainer.begin(_params())
  outcome = _run('union', 1, trainer)
  np.testing.assert_array_equal(outcome.tokens_NT, _plain().tokens)
  # Only the first stretch, of two rounds, may have been chosen before.
  assert outcome.rounds_by_shape.get('3_1_4', 0) <= 2


def test_a_drafter_that_is_not_finite_is_never_begun_with() -> None:
  trainer = _trainer()
  trainer.restore(trainer.init_state(_broken(_draft_params())))
  assert not trainer.is_healthy
  # A run that goes on from there knows without having seen it.
  other = _trainer()
  other.set_state(trainer.get_state())
  assert not other.is_healthy


def test_a_loss_that_is_not_finite_ends_training_only() -> None:
  trainer = _trainer()
  good = trainer.published()[1]
  trainer.begin(_broken(_params()))
  trainer.data.add(np.asarray([1, 2, 3, 4, 5]))
  trainer.train_until(threading.Event(), jax.devices()[0])
  assert not trainer.is_healthy
  assert trainer.take_effort().num_steps == 0
  jax.tree.map(np.testing.assert_array_equal, trainer.published()[1], good)


def test_a_state_goes_on_where_it_was() -> None:
  one, other = _trainer(batch_size=2), _trainer(batch_size=2)
  one.begin(_params())
  for length in (3, 9, 12, 20):
    one.data.add(np.arange(length) % 13)
  one.data.batch()
  other.set_state(one.get_state())
  jax.tree.map(
    np.testing.assert_array_equal, one.data.batch(), other.data.batch()
  )
  assert other.staleness == 1
