"""Savings by hand."""

import math

import pytest

from efficient_llm.ligo import ledger

_SCRATCH = ledger.Curve([100, 200, 300, 400], [3.0, 2.0, 1.5, 1.4])


def test_a_loss_between_two_points_is_interpolated() -> None:
  assert _SCRATCH.cost_of(2.5) == 150
  assert _SCRATCH.cost_of(3.5) == 100
  assert _SCRATCH.cost_of(1.0) is None


def test_operator_and_small_model_are_counted() -> None:
  grown = ledger.Curve([0, 100, 200], [2.0, 1.5, 1.3])
  found = ledger.saving(grown, _SCRATCH, operator=50, small=100)
  assert found is not None
  # 1.4 is reached half way between 100 and 200.
  assert (found.loss, found.reached) == (1.4, True)
  assert (found.grown, found.scratch) == pytest.approx((200, 400))
  assert found.warm == pytest.approx(0.5)
  assert found.cold == pytest.approx(0.25)
  assert found.break_even == pytest.approx(0.5)


def test_what_is_not_reached_is_compared_where_it_ended() -> None:
  grown = ledger.Curve([0, 100], [2.0, 1.5])
  found = ledger.saving(grown, _SCRATCH, operator=0, small=None)
  assert found is not None
  assert not found.reached
  assert found.loss == 1.5
  assert found.warm == pytest.approx(2 / 3)
  assert found.cold is None
  assert found.break_even is None


def test_growth_that_costs_more_never_breaks_even() -> None:
  grown = ledger.Curve([0, 500], [2.0, 1.4])
  found = ledger.saving(grown, _SCRATCH, operator=0, small=10)
  assert found is not None
  assert found.warm < 0
  assert found.break_even == math.inf


def test_a_loss_that_scratch_never_had_is_not_compared() -> None:
  grown = ledger.Curve([0, 100], [5.0, 4.0])
  found = ledger.saving(grown, _SCRATCH, operator=0, small=0)
  assert found is None


def test_a_curve_must_ascend() -> None:
  with pytest.raises(ValueError, match='ascend'):
    ledger.Curve([1, 1], [2.0, 1.0])
