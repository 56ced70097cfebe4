"""Learning rates by step: `optimizer.make_schedule`."""

import dataclasses
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm import optimizer

_schedules = st.builds(
  optimizer.OptimizerConfig,
  schedule=st.sampled_from(['cosine', 'wsd', 'constant']),
  learning_rate=st.floats(1e-6, 1.0),
  warmup_steps=st.integers(0, 60),
  decay_fraction=st.floats(0, 1),
  final_fraction=st.floats(0, 1),
)


@hypothesis.settings(max_examples=50)
@hypothesis.given(_schedules, st.integers(1, 80))
def test_a_learning_rate_is_between_zero_and_the_peak(
  config: optimizer.OptimizerConfig, num_steps: int
) -> None:
  hypothesis.assume(config.warmup_steps < num_steps)
  schedule = optimizer.make_schedule(config, num_steps=num_steps)
  # One length for all, as every other one is compiled anew.
  rates = np.asarray(schedule(np.arange(90)))
  assert (rates >= 0).all()
  # Rates are float32.
  assert (rates <= config.learning_rate * (1 + 1e-6)).all()
  peak = np.asarray(schedule(np.array(config.warmup_steps)))
  assert peak == pytest.approx(config.learning_rate, rel=1e-5)


@hypothesis.settings(max_examples=50)
@hypothesis.given(_schedules, st.integers(1, 80))
def test_a_decaying_schedule_ends_at_its_final_rate(
  config: optimizer.OptimizerConfig, num_steps: int
) -> None:
  config = dataclasses.replace(
    config, decay_fraction=max(0.1, config.decay_fraction)
  )
  hypothesis.assume(config.schedule != 'constant')
  hypothesis.assume(config.warmup_steps < num_steps)
  # Fewer than ten steps have no tenth.
  hypothesis.assume(num_steps >= 10)
  schedule = optimizer.make_schedule(config, num_steps=num_steps)
  final = config.learning_rate * config.final_fraction
  for step in (num_steps, num_steps + 7):
    rate = float(schedule(step))
    assert rate == pytest.approx(final, rel=1e-4, abs=1e-6)


def _rates(num_steps: int, **settings: Any) -> np.ndarray:
  config = optimizer.OptimizerConfig(learning_rate=1.0, **settings)
  schedule = optimizer.make_schedule(config, num_steps=num_steps)
  return np.array([float(schedule(step)) for step in range(num_steps + 1)])


@pytest.mark.parametrize('schedule', ['cosine', 'wsd', 'constant'])
def test_warm_up_is_linear_from_zero(schedule: str) -> None:
  rates = _rates(100, schedule=schedule, warmup_steps=10)
  np.testing.assert_allclose(rates[:11], np.arange(11) / 10, atol=1e-6)


@pytest.mark.parametrize('schedule', ['cosine', 'wsd', 'constant'])
def test_without_warm_up_the_first_rate_is_the_peak(schedule: str) -> None:
  assert _rates(100, schedule=schedule, warmup_steps=0)[0] == 1


def test_wsd_stays_at_the_peak_and_then_falls_in_a_line() -> None:
  rates = _rates(
    100,
    schedule='wsd',
    warmup_steps=10,
    decay_fraction=0.2,
    final_fraction=0.5,
  )
  np.testing.assert_array_equal(rates[10:81], np.ones(71))
  np.testing.assert_allclose(rates[80:], np.linspace(1, 0.5, 21), atol=1e-6)


def test_wsd_decays_to_the_end_where_warm_up_leaves_little_room() -> None:
  rates = _rates(
    100,
    schedule='wsd',
    warmup_steps=60,
    decay_fraction=0.8,
    final_fraction=0.1,
  )
  np.testing.assert_allclose(rates[60:], np.linspace(1, 0.1, 41), atol=1e-6)


def test_cosine_falls_all_the_way() -> None:
  rates = _rates(100, schedule='cosine', warmup_steps=10, final_fraction=0.1)
  assert (np.diff(rates[10:]) < 0).all()
  assert rates[55] == pytest.approx(0.55, abs=1e-6)


def test_a_constant_rate_stays() -> None:
  rates = _rates(30, schedule='constant', warmup_steps=10)
  np.testing.assert_array_equal(rates[10:], np.ones(21))


@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
def test_warm_up_must_end_before_the_run_does(schedule: str) -> None:
  with pytest.raises(
    ValueError, match=r'^optimizer.warmup_steps=9 must be below num_steps=9;'
  ):
    _rates(9, schedule=schedule, warmup_steps=9)
