import re

from efficient_llm.training import chart, page, sections


def _curve():
  return chart.Curve('Loss', [chart.Series('a', [1], [1])], 'steps', 'nats')


def test_neighbouring_charts_share_a_grid():
  text = sections.Text('Between', 'them')
  rendered = page.render('t', [_curve(), _curve(), text, _curve()])
  assert rendered.count('<div class="charts">') == 2


def test_a_page_loads_nothing_and_runs_nothing():
  rendered = page.render('t', [_curve(), sections.Text('a', 'b')])
  assert '<script' not in rendered
  assert '<link' not in rendered
  assert 'url(http' not in rendered
  assert '@import' not in rendered
  assert re.findall(r'\ssrc=', rendered) == []


def test_the_title_is_escaped_wherever_it_stands():
  rendered = page.render('</title><b>', [], subtitle='<i>')
  assert '<b>' not in rendered
  assert '<i>' not in rendered


def test_every_colour_has_a_value_for_light_and_for_dark():
  rendered = page.render('t', [_curve()])
  used = set(re.findall(r'var\((--[a-z0-9-]+)\)', rendered))
  light, dark = re.findall(r':root \{(.*?)\}', rendered, flags=re.DOTALL)
  for block in (light, dark):
    assert used <= set(re.findall(r'(--[a-z0-9-]+):', block))
