import dataclasses

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm.scaling import fit, published, sweep

_NEEDS_DATA = pytest.mark.skipif(
  not published.is_here(), reason='the published families are not at hand'
)


def _grid() -> tuple[np.ndarray, np.ndarray]:
  sizes = np.geomspace(1e7, 1e9, 5)
  tokens = np.geomspace(1e9, 3e10, 6)
  n, d = np.meshgrid(sizes, tokens)
  return n.ravel(), d.ravel()


@hypothesis.settings(max_examples=20)
@hypothesis.given(
  e=st.floats(0.5, 3.0),
  share_n=st.floats(0.1, 2.0),
  share_d=st.floats(0.1, 2.0),
  alpha=st.floats(0.1, 0.9),
  beta=st.floats(0.1, 0.9),
  loss=st.sampled_from(['squared', 'huber']),
)
def test_planted_constants_are_recovered(
  e: float, share_n: float, share_d: float, alpha: float, beta: float, loss
) -> None:
  n, d = _grid()
  planted = np.array(
    [e, share_n * 1e7**alpha, share_d * 1e9**beta, alpha, beta]
  )
  losses = fit.predict(planted, n, d)
  found = fit.solve([fit.Problem(n, d, losses)], loss=loss)
  # No noise, so the residuals are rounding; exponents near 0.1 amplify it by
  # the condition number of the law, 1e6 or so on this grid.
  np.testing.assert_allclose(found.constants[0], planted, rtol=1e-3)
  target = found.predict(np.array([1e11]), np.array([1e12]))[0, 0]
  truth = fit.predict(planted, np.array([1e11]), np.array([1e12]))[0]
  assert abs(target / truth - 1) < 1e-4


def test_problems_of_a_batch_do_not_touch_each_other() -> None:
  n, d = _grid()
  rng = np.random.default_rng(0)
  planted = np.array([1.7, 400.0, 2000.0, 0.34, 0.37])
  losses = fit.predict(planted, n, d)
  problems = [
    fit.Problem(n[:k], d[:k], losses[:k] * rng.lognormal(0, 0.01, k))
    for k in (8, 30, 12, 25, 17)
  ]
  together = fit.solve(problems)
  for i, problem in enumerate(problems):
    alone = fit.solve([problem])
    # The same program on the same numbers.
    np.testing.assert_array_equal(together.constants[i], alone.constants[0])


def test_a_weight_counts_as_so_many_rows() -> None:
  n, d = _grid()
  rng = np.random.default_rng(1)
  losses = fit.predict(np.array([1.7, 400.0, 2000.0, 0.34, 0.37]), n, d)
  losses = losses * rng.lognormal(0, 0.01, len(n))
  weight = rng.integers(0, 3, len(n))
  rows = np.repeat(np.arange(len(n)), weight)
  weighted = fit.solve([fit.Problem(n, d, losses, weight.astype(float))])
  repeated = fit.solve([fit.Problem(n[rows], d[rows], losses[rows])])
  np.testing.assert_allclose(weighted.objective, repeated.objective, rtol=1e-9)
  # A flat valley: the place is known to the root of what the value is.
  np.testing.assert_allclose(weighted.constants, repeated.constants, rtol=1e-3)


def test_problems_of_one_padded_shape_share_a_program() -> None:
  n, d = _grid()
  losses = fit.predict(np.array([1.7, 400.0, 2000.0, 0.34, 0.37]), n, d)
  fit.solve([fit.Problem(n, d, losses)])
  (before,) = {fit.program('squared')._cache_size()}
  for k in (10, 20, 29):
    fit.solve([fit.Problem(n[:k], d[:k], losses[:k])] * 3)
  assert fit.program('squared')._cache_size() == before


def test_all_that_is_computed_is_float64() -> None:
  for loss in ('squared', 'huber'):
    text = fit.lowered(loss)
    assert 'f64' in text
    assert 'f32' not in text
  assert jnp.zeros(1).dtype == np.float32  # and nobody else's types changed


def test_what_no_law_can_have_is_refused() -> None:
  with pytest.raises(ValueError, match='must be finite and above 0'):
    fit.solve([fit.Problem(np.ones(3), np.ones(3), np.array([1, 0, 2]))])
  with pytest.raises(ValueError, match='must be a problem'):
    fit.solve([])


@_NEEDS_DATA
def test_chinchilla_s_replication_is_reproduced() -> None:
  runs = published.families()['chinchilla_epoch']
  runs = runs.where(np.argsort(runs.loss)[:-5])
  problem = dataclasses.replace(
    sweep.problem_of(runs), num_tokens=runs.flops / 6 / runs.num_params
  )
  found = fit.solve([problem], loss='huber')
  # The file holds seven digits of what the reference had in full.
  np.testing.assert_allclose(found.objective[0], 0.001018274, rtol=1e-5)
  e, a, b, alpha, beta = found.constants[0]
  np.testing.assert_allclose(e, 1.81724, rtol=1e-4)
  np.testing.assert_allclose([a, b], [477.84, 2143.9], rtol=1e-3)
  np.testing.assert_allclose([alpha, beta], [0.347313, 0.367183], rtol=1e-4)
  squares = fit.solve([problem])
  np.testing.assert_allclose(squares.objective[0], 0.0832038077, rtol=1e-5)
  np.testing.assert_allclose(
    squares.constants[0],
    [1.882814, 567.805, 7581.85, 0.3576151, 0.4276206],
    rtol=1e-4,
  )


@_NEEDS_DATA
@pytest.mark.slow
def test_bootstraps_of_chinchilla_have_the_published_intervals() -> None:
  runs = published.families()['chinchilla_epoch']
  runs = runs.where(np.argsort(runs.loss)[:-5])
  rng = np.random.default_rng(0)
  count = len(runs)
  problems = [
    fit.Problem(
      runs.num_params,
      runs.flops / 6 / runs.num_params,
      runs.loss,
      rng.multinomial(count, [1 / count] * count).astype(float),
    )
    for _ in range(512)
  ]
  constants = fit.solve(problems, loss='huber').constants
  low, high = np.percentile(constants, [2.5, 97.5], axis=0)
  # Ends of intervals from 512 resamples scatter by about an eighth of a
  # standard error; those published are of 4,000.
  error = np.array([0.03, 124.58, 1293.23, 0.02, 0.02])
  np.testing.assert_array_less(
    np.abs(low - [1.769, 285.214, 1042.357, 0.317, 0.331]) / error, 0.5
  )
  np.testing.assert_array_less(
    np.abs(high - [1.871, 743.626, 5810.344, 0.373, 0.415]) / error, 0.5
  )
