"""Tests of what the table of islands says at its top."""

import pytest

from benchmarks import diloco_quality


def _row(val_loss: float, ood_loss: float = 2.0) -> dict[str, float]:
  return {
    'val_loss': val_loss,
    'ood_loss': ood_loss,
    'reduction_vs_data_parallel': 400.0,
  }


def test_the_better_optimiser_s_gap_is_told_against_its_own_baselines() -> None:
  rows = {
    'one_island': _row(2.0),
    'diloco': _row(1.6, 1.8),
    'data_parallel': _row(1.5),
    'muon_one_island': _row(1.9),
    'muon_diloco': _row(1.45),
    'muon_data_parallel': _row(1.4),
    'int4': _row(1.616),
    'long': _row(1.7),
    'long_streaming_int4': _row(1.717),
  }
  found = diloco_quality.summary(rows)
  assert found['gap_closed'] == pytest.approx(0.9)
  assert found['gap_closed_by_optimizer']['adamw'] == pytest.approx(0.8)
  assert found['int4_ratio'] == pytest.approx(1.01)
  assert found['streaming_int4_ratio'] == pytest.approx(1.01)
  assert found['ood_ratio'] == pytest.approx(0.9)
  assert found['streaming_int4_reduction'] == 400


def test_what_was_not_run_is_not_told() -> None:
  found = diloco_quality.summary({'diloco': _row(1.6)})
  assert found['gap_closed'] is None
  assert found['int4_ratio'] is None
