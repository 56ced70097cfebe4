import collections
import itertools

import numpy as np
import pytest

from efficient_llm.diloco import layer_schedule, published, streaming_table

_MODEL = layer_schedule.Model('model', 1e9, 10, 2.9)  # 29 nodes of 0.1 s


def _utilization(bits_per_sec: float, **method) -> float:
  found = layer_schedule.utilization(
    _MODEL,
    layer_schedule.Method('method', **method),
    np.array([bits_per_sec]),
  )
  return float(found[0])


def test_without_a_limit_nothing_waits() -> None:
  assert _utilization(1e30, sync_period=1) == pytest.approx(1.0)


def test_of_data_parallel_training_what_outlasts_the_backward_pass_waits() -> (
  None
):
  # 16 Gbit; the first layer's part may go once its 0.2 s are over, and the
  # link is busy from then on. Forward waits for it to end: 1 s + 0.2 s + 16 s.
  assert _utilization(1e9, sync_period=1) == pytest.approx(2.9 / 17.2)


def test_on_a_fast_link_the_last_layer_to_reduce_is_what_waits() -> None:
  # A tenth of 16 Gbit takes 0.05 s, less than the 0.2 s of a layer.
  assert _utilization(32e9, sync_period=1) == pytest.approx(2.9 / 2.95)


def test_only_the_step_of_an_exchange_waits() -> None:
  expected = 2.9 * 20 / (2.9 * 19 + 17.2)
  assert _utilization(1e9, sync_period=20) == pytest.approx(expected)


def test_a_quarter_of_the_bits_needs_a_quarter_of_the_bandwidth() -> None:
  assert _utilization(
    1e9, sync_period=20, bits_per_parameter=4.0
  ) == pytest.approx(_utilization(4e9, sync_period=20))


def test_an_overlap_hides_whole_steps() -> None:
  # Two steps of 2.9 s, after which 16 s - 1.7 s - 5.8 s remain.
  found = _utilization(1e9, sync_period=20, overlap_steps=2)
  assert found == pytest.approx(58 / (58 + 16 - 1.7 - 5.8), abs=2e-3)


@pytest.mark.parametrize('method', range(5))
def test_the_measured_period_is_the_steady_state(method: int) -> None:
  model, how = streaming_table.MODELS[0], streaming_table.METHODS[method]
  bits = streaming_table.GRID_GBITS * 1e9
  np.testing.assert_allclose(
    layer_schedule.utilization(model, how, bits),
    layer_schedule.utilization(model, how, bits, num_periods=9),
    rtol=1e-9,
  )


def test_streaming_diloco_bandwidths_come_out_within_a_point() -> None:
  cells = streaming_table.cells()
  assert len(cells) == 75
  assert all(abs(cell.num_off) <= 1 for cell in cells)
  beyond = [cell for cell in cells if cell.points_off > 1]
  # One is off by 1.7, however the fragments are spaced over the period.
  assert [(c.model, c.method, c.target) for c in beyond] == [
    ('100B', 'streaming, overlapped', 0.5)
  ]
  assert beyond[0].points_off < 2
  assert sum(cell.num_off == 0 for cell in cells) >= 65


def test_the_bandwidths_are_computed_not_looked_up() -> None:
  cells = streaming_table.cells()
  narrow = streaming_table.cells(gbit=2**29)
  pairs = zip(cells, narrow, strict=True)
  # Half the bits in a Gbit needs twice the Gbit: 3.7 places of the grid.
  ratios = [after.gbits / before.gbits for before, after in pairs]
  assert all(1.7 < ratio < 2.6 for ratio in ratios)


def test_a_gbit_of_a_billion_bits_fits_the_table_worse() -> None:
  found = [
    sum(cell.num_off == 0 for cell in streaming_table.cells(gbit=gbit))
    for gbit in (1e9, 2**30)
  ]
  assert found[0] < found[1] - 20


def test_every_published_bandwidth_is_on_the_grid_of_the_paper() -> None:
  for cell in streaming_table.cells():
    # One decimal, of what was rounded to two before.
    gap = abs(streaming_table.GRID_GBITS - cell.published_gbits).min()
    assert gap <= 0.055


def _by_kind() -> dict[str, list[published.Check]]:
  kinds = collections.defaultdict(list)
  for check in itertools.chain(published.intellect_1(), published.others()):
    kinds[check.kind].append(check)
  return kinds


def test_intellect_1_is_fitted_in_two_places_and_predicted_in_the_third() -> (
  None
):
  checks = published.intellect_1()
  assert [check.kind for check in checks] == 4 * ['fitted'] + 2 * ['predicted']
  percent = checks[1::2]
  assert [check.published for check in percent] == [95.7, 85.6, 83.0]
  for check in percent:
    assert abs(check.simulated - check.published) < 1


def test_the_prediction_depends_on_cities_that_were_not_published() -> None:
  percent = [value for _, value in published.intellect_1_by_cities()]
  assert min(percent) < 77 < 82 < np.median(percent) < 83 < max(percent) < 84


def test_a_third_bandwidth_of_two_workers_follows_from_two() -> None:
  (check,) = [c for c in published.others() if c.what.endswith(' 0.05 Gbit/s')]
  assert check.kind == 'predicted'
  assert check.simulated == pytest.approx(check.published, rel=0.01)
  assert check.simulated != check.published


def test_what_was_fitted_is_met_and_says_which_input_met_it() -> None:
  for check in _by_kind()['fitted']:
    assert check.simulated == pytest.approx(check.published, rel=1e-3)
    assert check.note
