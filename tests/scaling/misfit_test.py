"""What laws are off by, found again where it was planted."""

import numpy as np
import pytest

from efficient_llm.scaling import data, misfit


def test_planted_rates_are_found() -> None:
  rng = np.random.default_rng(0)
  count = 20_000
  apart = rng.uniform(0, 4, (count, 2))
  deviation = rng.uniform(0, 0.02, count)
  planted = misfit.Misfit(0.01, 0.03, 0.02, limit=np.log(10))
  errors = rng.laplace(scale=planted.expected(deviation, apart))
  groups = rng.choice(['a', 'b', 'c'], count).tolist()
  found = misfit.calibrate(errors, deviation, apart, groups)
  assert found.floor == pytest.approx(planted.floor, rel=0.15)
  assert found.per_size == pytest.approx(planted.per_size, rel=0.05)
  assert found.per_token == pytest.approx(planted.per_token, rel=0.05)
  # Nine in ten of Laplace's absolute errors are below log 10 scales.
  assert found.limit == pytest.approx(planted.limit, rel=0.05)


def test_groups_weigh_the_same_whatever_they_hold() -> None:
  rng = np.random.default_rng(1)
  count = 4000
  errors = np.r_[rng.laplace(scale=0.01, size=count), [0.2, -0.2] * 20]
  none = np.zeros((len(errors), 2))
  groups = ['many'] * count + ['few'] * 40
  found = misfit.calibrate(errors, np.zeros(len(errors)), none, groups)
  # The scale that is most likely is the mean of the groups' means.
  assert found.floor == pytest.approx((0.01 + 0.2) / 2, rel=0.05)


def test_the_largest_model_says_how_far_the_target_is() -> None:
  seen = data.make([1e8, 1e8, 2e7], [1e9, 2e9, 9e9], [3.0, 2.9, 3.1])
  target = data.make([1e9], [4e9], [np.nan])
  np.testing.assert_allclose(misfit.apart(seen, target), np.log([10, 2]))
  longer = data.make([1e8], [1e9], [np.nan])
  np.testing.assert_allclose(misfit.apart(seen, longer), [0, 0])
