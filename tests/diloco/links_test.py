import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficient_llm.diloco import cities, links, network_exchange

_WINDOW = 2**20


def _stream(trip: float, loss: float) -> float:
  bits = links.stream_bits(np.array(trip), np.array(loss), window_bytes=_WINDOW)
  return float(bits)


def test_a_path_without_loss_carries_a_window_each_round_trip() -> None:
  assert _stream(0.1, 0.0) == pytest.approx(8 * _WINDOW / 0.1)


def test_loss_bounds_a_stream_as_mathis_found() -> None:
  # 1460 bytes, 100 ms, one packet in 10,000: 1.43 Mbit/s times sqrt(150).
  assert _stream(0.1, 1e-4) == pytest.approx(14.305e6, rel=1e-4)


def test_four_times_the_loss_halves_the_rate_and_so_does_twice_the_delay() -> (
  None
):
  rate = _stream(0.1, 1e-4)
  assert _stream(0.1, 4e-4) == pytest.approx(rate / 2)
  assert _stream(0.2, 1e-4) == pytest.approx(rate / 2)


def _paths(transport: links.Transport, **link) -> links.Paths:
  names = ('Dallas', 'Washington', 'London')
  known = [links.Link(('London', 'Dallas'), **link)] if link else []
  world = links.Map([cities.find(n) for n in names], transport, known)
  return world.paths(np.array([0, 0]), np.array([1, 2]), np.full(2, 1e10))


def test_a_path_across_an_ocean_has_the_loss_of_oceans() -> None:
  transport = links.Transport(loss=1e-6, ocean_loss=3e-5)
  assert _paths(transport).loss.tolist() == [1e-6, 3e-5]


def test_what_is_known_of_a_link_holds_both_ways_and_for_it_alone() -> None:
  paths = _paths(links.Transport(), gbits=0.5, round_trip_ms=99.0, loss=0.25)
  assert paths.round_trip_secs.tolist() == [0.031, 0.099]
  assert paths.cap_bits.tolist() == [1e10, 5e8]
  assert paths.loss[1] == 0.25 != paths.loss[0]


def test_a_sample_is_the_same_for_the_same_seed_and_else_another() -> None:
  transport = links.Transport(jitter=0.2)

  def rate(seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    return links.sample(_paths(transport), transport, 1e9, rng)[1].tolist()

  assert rate(3) == rate(3)
  assert rate(3) != rate(4)


def test_samples_are_spread_around_what_is_expected() -> None:
  transport = links.Transport(jitter=0.2, window_mib=1.0, loss=0, ocean_loss=0)
  paths, rng = _paths(transport), np.random.default_rng(0)
  expected = links.sample(paths, transport, 1e9, None)[0]
  drawn = np.stack(
    [links.sample(paths, transport, 1e9, rng)[0] for _ in range(4000)]
  )
  # A median of 4,000 draws of spread 0.2 is off by 0.004.
  assert np.median(drawn, axis=0) == pytest.approx(expected, rel=0.02)
  assert np.log(drawn).std(axis=0) == pytest.approx(0.2, rel=0.05)


def _random_costs(size: int, seed: int) -> np.ndarray:
  half = np.triu(np.random.default_rng(seed).random((size, size)), 1)
  return half + half.T


def _slowest(secs: np.ndarray, order: list[int]) -> float:
  return max(secs[a, b] for a, b in itertools.pairwise([*order, order[0]]))


@pytest.mark.parametrize('seed', range(5))
def test_no_ring_of_few_places_has_a_faster_slowest_link(seed: int) -> None:
  secs = _random_costs(6, seed)
  best = min(
    _slowest(secs, list(order)) for order in itertools.permutations(range(6))
  )
  assert _slowest(secs, links.ring_order(secs)) == best


def test_places_on_a_circle_are_joined_along_it() -> None:
  angles = np.random.default_rng(1).permutation(12) * np.pi / 6
  points = np.exp(1j * angles)
  secs = abs(points[:, None] - points[None, :])
  order = links.ring_order(secs)
  assert sorted(order) == list(range(12))
  assert _slowest(secs, order) == pytest.approx(2 * np.sin(np.pi / 12))


@given(
  wanted=st.lists(st.floats(0.01, 100), min_size=1, max_size=20),
  share=st.floats(0.01, 2),
)
def test_a_shared_link_is_full_or_all_have_what_they_want(
  wanted: list[float], share: float
) -> None:
  wishes = np.array(wanted)
  total = share * wishes.sum()
  rates = network_exchange.fair_rates(wishes, total)
  assert rates.sum() == pytest.approx(min(total, wishes.sum()))
  assert (rates <= wishes).all()
  # Who has less than it wants has as much as anybody.
  short = rates < wishes * (1 - 1e-9)
  assert (rates[short] >= rates.max() * (1 - 1e-9)).all()


def test_a_measured_round_trip_is_used_either_way() -> None:
  tokyo, dallas = cities.find('Tokyo'), cities.find('Dallas')
  assert cities.round_trip_secs(tokyo, dallas) == 0.143
  assert cities.round_trip_secs(dallas, tokyo) == 0.143


def test_other_round_trips_go_with_the_distance() -> None:
  here, there, beyond = (
    cities.find(f'{name}:0:{degrees}')
    for name, degrees in (('a', 0), ('b', 20), ('c', 40))
  )
  near = cities.round_trip_secs(here, there)
  assert cities.round_trip_secs(here, beyond) == pytest.approx(2 * near)
  # No faster than light in glass, 200 km a millisecond, there and back.
  assert near > 2 * cities.distance_km(here, there) / 200e3


def test_a_quarter_of_the_globe_is_ten_thousand_kilometres() -> None:
  north, equator = cities.find('pole:90:0'), cities.find('line:0:33')
  assert cities.distance_km(north, equator) == pytest.approx(10_007.5, abs=1)


def test_a_place_of_ones_own_is_in_the_region_of_its_nearest_city() -> None:
  assert cities.find('Osnabrueck:52.3:8.0').region == 'Europe'


@pytest.mark.parametrize(
  'text', ['Atlantis', 'a:1', 'a:x:2', 'a:91:0', 'a:nan:0']
)
def test_a_place_that_is_not_known_is_refused_with_those_that_are(
  text: str,
) -> None:
  with pytest.raises(ValueError, match=r'NAME:LATITUDE:LONGITUDE') as error:
    cities.find(text)
  assert 'Washington' in str(error.value)
  assert '\n' not in str(error.value)
