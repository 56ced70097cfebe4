import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficient_llm.training import units


@pytest.mark.parametrize(
  ('secs', 'text'),
  [
    (0, '0s'),
    (0.00042, '0.42ms'),
    (0.354, '0.35s'),
    (9.96, '10s'),
    (59.6, '1m00s'),
    (80, '1m20s'),
    (3599.7, '1h00m'),
    (7500, '2h05m'),
    (273_600, '3d04h'),
  ],
)
def test_durations_read_as_people_write_them(secs, text):
  assert units.format_duration(secs) == text


@pytest.mark.parametrize('secs', [-1.0, float('nan'), float('inf')])
def test_a_duration_that_is_none_is_refused(secs):
  with pytest.raises(ValueError, match='must be finite and not negative'):
    units.format_duration(secs)


@pytest.mark.parametrize(
  ('count', 'text'),
  [
    (0, '0'),
    (950, '950'),
    (999.7, '1k'),
    (12_345, '12.3k'),
    (1_200_000, '1.2M'),
    (8.03e9, '8.03B'),
    (1.5e13, '15T'),
    (-2500, '-2.5k'),
  ],
)
def test_counts_have_three_digits(count, text):
  assert units.format_count(count) == text


@given(st.floats(1, 9e14))
def test_a_count_is_within_half_a_percent_of_what_it_stands_for(count):
  text = units.format_count(count)
  factor = {'k': 1e3, 'M': 1e6, 'B': 1e9, 'T': 1e12}.get(text[-1])
  value = float(text[:-1]) * factor if factor else float(text)
  # Three digits round by at most 0.5 in 100.
  assert value == pytest.approx(count, rel=0.005)


@pytest.mark.parametrize(
  ('num_bytes', 'text'),
  [(0, '0 B'), (1010, '1010 B'), (1536, '1.5 KiB'), (141 * 10**9, '131 GiB')],
)
def test_sizes_have_binary_units(num_bytes, text):
  assert units.format_bytes(num_bytes) == text
