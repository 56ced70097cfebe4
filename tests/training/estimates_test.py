"""Tests of the time estimate, over all inputs."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from efficient_llm.training import collectives, estimates

_RATES = estimates.Rates(
  flops_per_sec=1e12,
  peak_flops_per_sec=1e12,
  memory_bytes_per_sec=1e9,
  interconnect_bytes_per_sec=1e8,
  network_bytes_per_sec=1e6,
  origin='A test.',
)
_WORK = estimates.Work(
  model_flops=4e12,
  recomputed_share=0.0,
  memory_traffic_bytes=0,
  collectives=(),
  num_devices=4,
  num_steps=10,
  tokens_per_step=100,
)


def _estimate(
  work: estimates.Work, *, matmul_efficiency: float = 1.0
) -> estimates.Estimate:
  result, assumptions = estimates.estimate(
    work, _RATES, matmul_efficiency=matmul_efficiency
  )
  assert result is not None
  assert assumptions
  return result


def _moved(num_bytes: int, **changes: bool) -> collectives.Collective:
  return collectives.Collective(
    kind='all-gather',
    mesh_axes=('fsdp',),
    count=1,
    bytes_per_device_per_step=num_bytes,
    **{'overlapped': False, 'crosses_network': False, **changes},
  )


def test_compute_alone_at_the_peak_rate_is_full_utilisation() -> None:
  result = _estimate(_WORK)
  assert result.step_secs == pytest.approx(1.0)
  assert result.mfu == pytest.approx(1.0)
  assert result.total_secs == pytest.approx(10.0)
  assert result.tokens_per_sec == pytest.approx(100.0)


def test_recomputation_costs_time_and_utilisation() -> None:
  work = dataclasses.replace(_WORK, recomputed_share=1 / 3)
  assert _estimate(work).mfu == pytest.approx(0.75)


def test_a_collective_beside_compute_is_hidden_as_long_as_that_lasts() -> None:
  # One second of compute, collectives of half and of two seconds.
  for num_bytes, step_secs in ((5e7, 1.0), (2e8, 2.0)):
    moved = _moved(int(num_bytes), overlapped=True)
    work = dataclasses.replace(_WORK, collectives=(moved,))
    assert _estimate(work).step_secs == pytest.approx(step_secs)


def test_a_collective_that_waits_is_added() -> None:
  work = dataclasses.replace(_WORK, collectives=(_moved(10**8),))
  assert _estimate(work).step_secs == pytest.approx(2.0)


def test_what_leaves_a_slice_goes_at_the_network_s_rate() -> None:
  moved = _moved(10**6, crosses_network=True)
  work = dataclasses.replace(_WORK, collectives=(moved,))
  assert _estimate(work).exposed_collective_secs == pytest.approx(1.0)


@hypothesis.given(
  flops=st.floats(1e6, 1e18),
  traffic=st.integers(0, 10**13),
  moved=st.lists(
    st.tuples(st.integers(0, 10**12), st.booleans(), st.booleans()), max_size=4
  ),
  efficiency=st.floats(0.05, 1.0),
)
def test_a_step_is_never_faster_than_any_of_its_parts(
  flops: float,
  traffic: int,
  moved: list[tuple[int, bool, bool]],
  efficiency: float,
) -> None:
  work = dataclasses.replace(
    _WORK,
    model_flops=flops,
    memory_traffic_bytes=traffic,
    collectives=tuple(
      _moved(n, overlapped=o, crosses_network=c) for n, o, c in moved
    ),
  )
  result = _estimate(work, matmul_efficiency=efficiency)
  slowest = max(
    result.compute_secs, result.memory_secs or 0.0, result.collective_secs
  )
  # Sums of floats.
  assert result.step_secs >= slowest * (1 - 1e-9)
  assert result.mfu <= efficiency * (1 + 1e-9)


@pytest.mark.parametrize('share', [0.0, -1.0, 1.01, float('nan')])
def test_an_efficiency_that_is_no_share_is_refused(share: float) -> None:
  with pytest.raises(ValueError, match='matmul_efficiency'):
    estimates.check_efficiency(share)
