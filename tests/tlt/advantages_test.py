"""Tests of advantages: formulas, groups, punishment of long answers."""

from typing import Any

import numpy as np
import pytest

from efficient_llm.tlt import advantages

# Two prompts; the answers to one of them do not stand together.
_REWARDS = np.array([1.0, 0.0, 0.0, 2.0, 0.0, 4.0])
_GROUPS = np.array([7, 7, 7, 3, 7, 3])


def _advantages(
  rewards: Any = _REWARDS, groups: Any = _GROUPS, **options: Any
) -> np.ndarray:
  return advantages.advantages(
    np.asarray(rewards), np.asarray(groups), **options
  )


@pytest.mark.parametrize('algorithm', ['grpo', 'dapo', 'gspo'])
def test_the_difference_to_the_group_is_in_standard_deviations(
  algorithm: advantages.Algorithm,
) -> None:
  config = advantages.AdvantageConfig(epsilon=0.5)
  # Group 7: mean 1/4, variance (9 + 1 + 1 + 1) / 16 / 4 = 3/16.
  # Group 3: mean 3, standard deviation 1.
  divisor = 3**0.5 / 4 + 0.5
  wanted = [
    0.75 / divisor,
    -0.25 / divisor,
    -0.25 / divisor,
    -1 / 1.5,
    -0.25 / divisor,
    1 / 1.5,
  ]
  found = _advantages(algorithm=algorithm, config=config)
  np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_dr_grpo_leaves_the_difference_as_it_is() -> None:
  found = _advantages(algorithm='dr_grpo')
  np.testing.assert_allclose(found, [0.75, -0.25, -0.25, -1, -0.25, 1])


@pytest.mark.parametrize(
  ('algorithm', 'scale', 'wanted'),
  [('grpo', 'none', [-0.5, 0.5]), ('dr_grpo', 'std', [-1.0, 1.0])],
)
def test_the_scale_may_depart_from_the_algorithm(
  algorithm: advantages.Algorithm, scale: Any, wanted: list[float]
) -> None:
  config = advantages.AdvantageConfig(scale=scale, epsilon=0.0)
  found = _advantages([0.0, 1.0], [0, 0], algorithm=algorithm, config=config)
  np.testing.assert_allclose(found, wanted)


@pytest.mark.parametrize('epsilon', [0.0, 1e-6])
def test_equal_rewards_give_exactly_no_advantage(epsilon: float) -> None:
  config = advantages.AdvantageConfig(epsilon=epsilon)
  # The float64 mean of three times 0.1 is not 0.1.
  found = _advantages([0.1, 0.1, 0.1, 5.0], [0, 0, 0, 1], config=config)
  np.testing.assert_array_equal(found, np.zeros(4))


def test_a_group_is_informative_unless_its_rewards_are_all_equal() -> None:
  found = advantages.informative(
    np.array([0.1, 0.1, 0.0, 0.1, 1.0, 3.0]), np.array([5, 5, 2, 5, 2, 9])
  )
  np.testing.assert_array_equal(found, [False, False, True, False, True, False])


def test_a_group_with_a_failed_reward_is_not_informative() -> None:
  found = advantages.informative(
    np.array([0.0, np.nan, 1.0, 0.0, 1.0]), np.array([0, 0, 0, 1, 1])
  )
  np.testing.assert_array_equal(found, [False, False, False, True, True])


def test_the_punishment_falls_over_the_buffer() -> None:
  found = advantages.soft_overlong_punishment(
    np.array([1, 6, 7, 9, 10, 12]), buffer_tokens=4, max_completion_tokens=10
  )
  # Free up to 10 - 4 tokens, then (6 - length) / 4.
  np.testing.assert_allclose(found, [0, 0, -0.25, -0.75, -1, -1])


def test_the_punishment_is_added_to_the_reward() -> None:
  config = advantages.AdvantageConfig(overlong_buffer_tokens=4)
  found = _advantages(
    [1.0, 1.0],
    [0, 0],
    algorithm='dr_grpo',
    config=config,
    lengths_N=np.array([3, 8]),
    max_completion_tokens=10,
  )
  # Rewards 1 and 1 - 2/4, mean 3/4.
  np.testing.assert_allclose(found, [0.25, -0.25])


def test_a_reward_that_is_not_finite_is_refused() -> None:
  with pytest.raises(ValueError, match='answer 1 is nan; leave its group out'):
    _advantages([0.0, np.nan], [0, 0])


def test_the_punishment_without_lengths_is_refused() -> None:
  config = advantages.AdvantageConfig(overlong_buffer_tokens=4)
  with pytest.raises(ValueError, match='needs lengths_N'):
    _advantages(config=config)


def test_a_buffer_longer_than_the_longest_completion_is_refused() -> None:
  with pytest.raises(ValueError, match='overlong_buffer_tokens=11 must be'):
    advantages.soft_overlong_punishment(
      np.array([1]), buffer_tokens=11, max_completion_tokens=10
    )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'scale': 'mean'}, "scale='mean' must be one of std, none, None"),
    ({'epsilon': -1.0}, 'epsilon=-1.0 must be 0 or more'),
    ({'epsilon': float('nan')}, 'epsilon=nan must be 0 or more'),
    (
      {'overlong_buffer_tokens': 0},
      'overlong_buffer_tokens=0 must be at least',
    ),
  ],
)
def test_a_setting_out_of_range_is_refused(
  changes: dict[str, Any], message: str
) -> None:
  advantages.AdvantageConfig().validate()
  with pytest.raises(ValueError, match=message):
    advantages.AdvantageConfig(**changes).validate()
