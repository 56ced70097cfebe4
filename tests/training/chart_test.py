import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_llm.training import chart

_POINTS = st.lists(st.tuples(st.floats(), st.floats()), max_size=6)


def _curve(x, y, **settings):
  return chart.Curve(
    'Loss', [chart.Series('training', x, y)], 'steps', 'nats', **settings
  )


def _svg(rendered):
  start, end = rendered.index('<svg'), rendered.index('</svg>') + 6
  return ElementTree.fromstring(rendered[start:end])


@settings(max_examples=25)
@given(_POINTS, st.booleans(), st.booleans())
def test_any_points_give_a_drawing_or_say_that_there_are_none(
  points, log_x, log_y
):
  x, y = [point[0] for point in points], [point[1] for point in points]
  rendered = _curve(x, y, log_x=log_x, log_y=log_y).render()
  assert ('No data was recorded.' in rendered) != ('<svg' in rendered)


def test_no_points_and_only_nan_say_that_there_are_none():
  for x, y in (([], []), ([1.0], [math.nan])):
    assert 'No data was recorded.' in _curve(x, y).render()


def test_one_point_is_visible():
  assert _curve([1], [2.0]).render().count('<use') == 1


def test_the_same_curve_is_drawn_byte_for_byte_the_same():
  curve = _curve(range(10), np.linspace(3, 1, 10))
  assert curve.render() == curve.render()


def test_a_long_series_costs_little_more_than_a_short_one():
  y = np.random.default_rng(0).normal(size=50_000)
  long = len(_curve(np.arange(50_000), y).render())
  # Mean and range of 300 stretches, at about 20 bytes a point.
  assert long < len(_curve([1, 2], [1, 2]).render()) + 3 * 300 * 40


def test_the_range_behind_a_long_series_reaches_its_extremes():
  y = np.ones(3000)
  y[1234] = 50.0
  labels = [e.text for e in _svg(_curve(range(3000), y).render()).iter()]
  assert '50' in labels


def test_a_drawing_takes_its_colours_from_the_page():
  rendered = _curve(range(5), range(5)).render()
  assert 'var(--series-0)' in rendered
  assert 'var(--muted)' in rendered
  # None of its own, which would be unreadable on one of the backgrounds.
  assert re.findall(r'(?:fill|stroke): #(?!fff)\w+', rendered) == []


def test_a_drawing_needs_nothing_from_the_network():
  rendered = _curve(range(5), range(5)).render()
  links = re.findall(r'(?:href|src)="([^"]*)"', rendered)
  assert all(link.startswith('#') for link in links)


def test_no_id_stands_twice_on_a_page_unless_it_names_the_same_shape():
  page = _curve(range(5), range(5)).render() + _curve([1], [7]).render()
  shapes = re.findall(r'<(?:path|clipPath) id="([^"]+)"([^>]*)', page)
  assert len(set(shapes)) == len({name for name, _ in shapes})
  assert re.findall(r' id="(?:figure|axes|patch|text)_', page) == []


@pytest.mark.parametrize(
  'text', ['$\\frac$', '<script>x</script>', '" onload="x', 'a & b', '#010203']
)
def test_any_label_is_shown_as_it_is(text):
  curve = chart.Curve(
    text,
    [chart.Series(text, [1, 2], [3, 4]), chart.Series('b', [1], [2])],
    text,
    text,
    note=text,
  )
  rendered = curve.render()
  root = ElementTree.fromstring(rendered)
  assert '<script' not in rendered
  assert 'onload' not in {name for e in root.iter() for name in e.attrib}
  drawn = [e.text for e in _svg(rendered).iter()]
  assert text in drawn or text == '#010203'


def test_a_logarithmic_axis_is_labelled_with_powers_in_plain_text():
  rendered = _curve([1, 1e9], [1, 2], log_x=True).render()
  assert '10⁸' in rendered
  assert 'mathdefault' not in rendered


def test_a_logarithmic_axis_of_less_than_a_decade_is_labelled():
  svg = _svg(_curve([1, 2], [1.5, 4.5], log_y=True).render())
  assert {'2', '3'} <= {element.text for element in svg.iter()}


def test_an_axis_from_zero_shows_zero():
  x, y = [1, 2], [100.0, 101.0]
  assert '0' not in {e.text for e in _svg(_curve(x, y).render()).iter()}
  svg = _svg(_curve(x, y, from_zero=True).render())
  assert '0' in {element.text for element in svg.iter()}


def test_what_cannot_be_seen_is_described():
  label = _svg(_curve([1, 2], [5.5, 1.75]).render()).attrib['aria-label']
  assert label == 'nats against steps: training from 5.5 to 1.75.'


def test_series_of_unequal_length_are_refused():
  with pytest.raises(ValueError, match='must have one y per x'):
    _curve([1, 2], [1]).render()
