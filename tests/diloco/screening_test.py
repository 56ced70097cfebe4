"""Tests of finding bad islands, and of merging in spite of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.diloco import outer, screening

_ISLANDS = 5
_BAD = 3


def _deltas(seed: int = 0) -> dict[str, np.ndarray]:
  """Islands that agree by and large."""
  rng = np.random.default_rng(seed)
  shapes = {'a': (3, 40), 'b': (50,)}
  return {
    name: (
      rng.normal(size=(1, *shape)) + rng.normal(size=(_ISLANDS, *shape)) / 2
    ).astype(np.float32)
    for name, shape in shapes.items()
  }


def _spoilt(how: Any) -> dict[str, np.ndarray]:
  deltas = _deltas()
  for x_M in deltas.values():
    x_M[_BAD] = how(x_M[_BAD])
  return deltas


def _judge(
  deltas: Any, weights: Any = None, seen: Any = None, **settings: Any
) -> screening.Verdict:
  config = screening.ScreeningConfig(**{'min_cosine': 0.0, **settings})
  weights = jnp.ones(_ISLANDS) if weights is None else jnp.asarray(weights)
  if seen is None:
    seen = jnp.zeros((_ISLANDS, 2), jnp.uint32)
  return screening.judge(deltas, weights, seen, config)


def _reasons(verdict: screening.Verdict) -> list[str]:
  return [screening.REASONS[code] for code in verdict.codes_M]


def _expected(reason: str) -> list[str]:
  return ['accepted'] * _BAD + [reason] + ['accepted'] * (_ISLANDS - _BAD - 1)


def test_islands_that_agree_are_accepted() -> None:
  assert set(_reasons(_judge(_deltas()))) == {'accepted'}


@pytest.mark.parametrize(
  ('how', 'reason'),
  [
    (lambda x: x * np.where(x == x.max(), np.nan, 1), 'not finite'),
    (lambda x: x * np.where(x == x.max(), np.inf, 1), 'not finite'),
    (lambda x: 100 * x, 'too large'),
    (lambda x: -x, 'against the rest'),
  ],
)
def test_a_bad_update_is_found_and_named(how: Any, reason: str) -> None:
  assert _reasons(_judge(_spoilt(how))) == _expected(reason)


def test_an_update_sent_again_is_found() -> None:
  first = screening.fingerprints(_deltas(0))
  seen = jnp.stack([first, jnp.zeros_like(first)], 1)
  deltas = _deltas(1)
  for name, x_M in deltas.items():
    x_M[_BAD] = _deltas(0)[name][_BAD]
  assert _reasons(_judge(deltas, seen=seen)) == _expected('replayed')


def test_any_flipped_bit_changes_the_fingerprint() -> None:
  deltas = _deltas()
  before = screening.fingerprints(deltas)
  for bit in range(32):
    changed = {name: x_M.copy() for name, x_M in deltas.items()}
    changed['b'].view(np.uint32)[_BAD, 17] ^= np.uint32(1 << bit)
    differs = np.asarray(screening.fingerprints(changed) != before)
    assert differs.tolist() == [m == _BAD for m in range(_ISLANDS)]


def test_exchanged_values_change_the_fingerprint() -> None:
  deltas = _deltas()
  changed = {name: x_M[..., ::-1] for name, x_M in deltas.items()}
  assert (
    screening.fingerprints(deltas) != screening.fingerprints(changed)
  ).all()


def test_an_absent_island_is_not_judged_and_does_not_judge() -> None:
  weights = np.ones(_ISLANDS)
  weights[_BAD] = 0
  verdict = _judge(_spoilt(lambda x: x * np.nan), weights)
  assert set(_reasons(verdict)) == {'accepted'}


def test_of_two_islands_neither_is_against_the_rest() -> None:
  deltas = {'a': np.array([[1.0, 0.0], [-1.0, 0.1]], np.float32)}
  verdict = _judge(deltas, jnp.ones(2), jnp.zeros((2, 1), jnp.uint32))
  assert set(_reasons(verdict)) == {'accepted'}


def test_cosines_are_those_with_the_others_mean_direction() -> None:
  deltas = _deltas()
  verdict = _judge(deltas)
  flat = np.concatenate(
    [x_M.reshape(_ISLANDS, -1) for x_M in deltas.values()], 1
  )
  units = flat / np.linalg.norm(flat, axis=1, keepdims=True)
  for m in range(_ISLANDS):
    rest = units.sum(0) - units[m]
    expected = units[m] @ rest / np.linalg.norm(rest)
    assert verdict.cosines_M[m] == pytest.approx(expected, abs=1e-5)


def test_the_trimmed_mean_leaves_out_both_ends() -> None:
  values = {'w': np.array([[5.0], [1.0], [1e9], [2.0], [-1e9]], np.float32)}
  merged = screening.trimmed_mean(values, jnp.ones(5), trim=1)
  np.testing.assert_allclose(merged['w'], [8 / 3], rtol=1e-6)


def test_the_trimmed_mean_does_not_see_absent_islands() -> None:
  values = {'w': np.array([[np.nan], [1.0], [2.0], [4.0]], np.float32)}
  merged = screening.trimmed_mean(
    values, jnp.array([0.0, 1.0, 1.0, 1.0]), trim=1
  )
  np.testing.assert_array_equal(merged['w'], [2.0])


def test_the_geometric_median_withstands_one_wild_island() -> None:
  good = screening.geometric_median(_deltas(), jnp.ones(_ISLANDS))
  wild = screening.geometric_median(
    _spoilt(lambda x: 1e4 * x), jnp.ones(_ISLANDS)
  )
  mean = outer.weighted_mean(_spoilt(lambda x: 1e4 * x), jnp.ones(_ISLANDS))
  for name in good:
    # The spread between islands is 0.5.
    assert np.abs(good[name] - wild[name]).max() < 1
    assert np.abs(good[name] - mean[name]).max() > 100


def test_the_geometric_median_is_a_minimum() -> None:
  deltas = _deltas()
  point = screening.geometric_median(deltas, jnp.ones(_ISLANDS))

  def distance(scale: float, seed: int) -> float:
    rng = np.random.default_rng(seed)
    squares = np.zeros(_ISLANDS)
    for name, x_M in deltas.items():
      moved = point[name] + scale * rng.normal(size=point[name].shape)
      squares += np.square(x_M - moved).reshape(_ISLANDS, -1).sum(1)
    return float(np.sqrt(squares).sum())

  for seed in range(5):
    assert distance(0, seed) < distance(0.05, seed)


def test_the_verdict_is_the_same_in_a_compiled_program() -> None:
  deltas = _spoilt(lambda x: 100 * x)
  compiled = jax.jit(_judge)(deltas)
  assert _reasons(compiled) == _reasons(_judge(deltas))


@pytest.mark.parametrize(
  ('settings', 'expected'),
  [
    ({'norm_cap': 1.0}, 'screening.norm_cap=1.0 must'),
    ({'min_cosine': 2.0}, 'screening.min_cosine=2.0 must'),
    ({'merge': 'median'}, 'screening.merge'),
    ({'merge': 'trimmed_mean', 'trim': 2}, 'screening.trim=2 must'),
  ],
)
def test_a_setting_that_makes_no_sense_is_refused(
  settings: dict[str, Any], expected: str
) -> None:
  with pytest.raises(ValueError, match=expected):
    screening.ScreeningConfig(**settings).check(num_islands=4)
