"""Tests of the outer step: its sign, its size, who counts in it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.diloco import outer


def _params(seed: int = 0) -> dict[str, Any]:
  rng = np.random.default_rng(seed)
  return {
    'a': rng.normal(size=(3, 4)).astype(np.float32),
    'b': {'c': rng.normal(size=5).astype(np.float32)},
  }


def _step(deltas: Any, weights: Any, *, state=None, **settings: Any) -> Any:
  optimizer = outer.make_optimizer(
    outer.OuterConfig(**settings), num_islands=len(weights)
  )
  state = state or outer.init(_params(), optimizer)
  return outer.outer_step(state, deltas, weights, optimizer=optimizer)


def _moved(state: outer.OuterState) -> Any:
  return jax.tree.map(lambda new, old: new - old, state.params, _params())


def test_parameters_move_to_where_an_island_went() -> None:
  delta = jax.tree.map(lambda old, new: old - new, _params(0), _params(1))
  state = _step([delta], [1], optimizer='sgd', learning_rate=1.0)
  jax.tree.map(
    lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6),
    state.params,
    _params(1),
  )


def test_the_first_nesterov_step_moves_1_33_times_the_outer_gradient() -> None:
  delta = _params(1)
  moved = _moved(_step([delta], [1], learning_rate=0.7, momentum=0.9))
  jax.tree.map(
    lambda got, want: np.testing.assert_allclose(got, -1.33 * want, atol=1e-6),
    moved,
    delta,
  )


def test_equal_steps_end_up_seven_times_as_long() -> None:
  optimizer = outer.make_optimizer(outer.OuterConfig(), num_islands=1)
  state = outer.init({'w': jnp.float32(0)}, optimizer)
  for _ in range(200):
    last = state
    state = outer.outer_step(
      state, [{'w': jnp.float32(1)}], [1], optimizer=optimizer
    )
  moved = state.params['w'] - last.params['w']
  assert moved == pytest.approx(-0.7 / (1 - 0.9), rel=1e-4)


def test_a_list_of_trees_and_a_leading_axis_give_the_same_bits() -> None:
  deltas = [_params(1), _params(2), _params(3)]
  stack = jax.tree.map(lambda *leaves: np.stack(leaves), *deltas)
  one, other = _step(deltas, [3, 1, 2]), _step(stack, np.array([3, 1, 2]))
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_islands_count_by_their_weight() -> None:
  state = _step([_params(1), _params(2)], [3, 1], optimizer='sgd')
  jax.tree.map(
    lambda got, one, other: np.testing.assert_allclose(
      got, -0.7 * (0.75 * one + 0.25 * other), atol=1e-6
    ),
    _moved(state),
    _params(1),
    _params(2),
  )


@pytest.mark.parametrize('optimizer', ['nesterov', 'sgd', 'adam'])
def test_the_order_of_islands_changes_nothing_but_rounding(
  optimizer: Any,
) -> None:
  deltas = [_params(1), _params(2), _params(3)]
  one = _step(deltas, [3, 1, 2], optimizer=optimizer)
  other = _step(deltas[::-1], [2, 1, 3], optimizer=optimizer)
  jax.tree.map(
    # Sums of three in another order: two roundings of numbers below 3.
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    one.params,
    other.params,
  )


def test_without_weight_an_update_may_be_anything() -> None:
  bad = jax.tree.map(lambda x: x * np.nan, _params(1))
  with_bad = _step([_params(1), bad], [1, 0])
  without = _step([_params(1)], [1])
  jax.tree.map(np.testing.assert_array_equal, with_bad, without)


def test_a_round_without_updates_changes_nothing() -> None:
  state = _step([_params(1)], [1])
  bad = jax.tree.map(lambda x: x * np.nan, _params(1))
  again = _step([bad], [0], state=state)
  jax.tree.map(np.testing.assert_array_equal, again, state)
  assert again.version == 1


def test_rate_1_without_momentum_is_averaging_to_the_last_bit() -> None:
  optimizer = outer.make_optimizer(
    outer.OuterConfig(learning_rate=1.0, momentum=0.0), num_islands=1
  )
  state = outer.init(_params(0), optimizer)
  # Far from the shared parameters, so that the difference is rounded.
  island = jax.tree.map(lambda x: x * np.float32(1e-3), _params(1))
  delta = jax.tree.map(jnp.subtract, state.params, island)
  state = outer.outer_step(
    state, [delta], [7], optimizer=optimizer, averaged=island
  )
  jax.tree.map(np.testing.assert_array_equal, state.params, island)


def test_values_count_only_the_islands_that_sent_them() -> None:
  deltas = np.array([[2.0, 0.0, 0.0], [4.0, 3.0, 0.0]], np.float32)
  merged = outer.mean_where_sent({'w': deltas}, jnp.array([1.0, 1.0]))
  np.testing.assert_array_equal(merged['w'], [3.0, 3.0, 0.0])


def test_delayed_nesterov_follows_the_published_rule() -> None:
  rate, momentum, delay = 0.5, 0.9, 3
  optimizer = outer.delayed_nesterov(rate, momentum=momentum, delay=delay)
  state = outer.init({'w': jnp.float32(1.0)}, optimizer)
  theta, m, pending = 1.0, 0.0, 0.0
  for t, g in enumerate(np.random.default_rng(0).normal(size=10)):
    pending += g
    if (t + 1) % delay:
      theta -= rate * g / delay
    else:
      m = momentum * m + pending / delay
      theta -= rate * (momentum * m + g / delay)
      pending = 0.0
    state = outer.outer_step(
      state, [{'w': jnp.float32(g)}], [1], optimizer=optimizer
    )
  assert state.params['w'] == pytest.approx(theta, abs=1e-5)


@pytest.mark.parametrize(
  ('num_islands', 'rate'), [(1, 0.4), (3, 0.6), (8, 0.8), (64, 0.8)]
)
def test_the_recommended_rate_rises_with_the_number_of_islands(
  num_islands: int, rate: float
) -> None:
  optimizer = outer.make_optimizer(
    outer.OuterConfig(learning_rate=None, momentum=0.0), num_islands=num_islands
  )
  state = outer.init({'w': jnp.float32(0)}, optimizer)
  state = outer.outer_step(
    state, [{'w': jnp.float32(1)}], [1], optimizer=optimizer
  )
  assert state.params['w'] == pytest.approx(-rate)


@pytest.mark.parametrize(
  ('settings', 'expected'),
  [
    ({'optimizer': 'lion'}, 'outer.optimizer'),
    ({'learning_rate': 0.0}, 'outer.learning_rate=0.0 must'),
    ({'momentum': 1.0}, 'outer.momentum=1.0 must'),
    ({'epsilon': 0.0}, 'outer.epsilon=0.0 must'),
    ({'delay': 0}, 'outer.delay=0 must'),
  ],
)
def test_a_setting_that_makes_no_sense_is_refused(
  settings: dict[str, Any], expected: str
) -> None:
  with pytest.raises(ValueError, match=expected):
    outer.make_optimizer(outer.OuterConfig(**settings), num_islands=2)
