import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from efficient_llm.diloco import (
  cities,
  links,
  network,
  network_exchange,
  network_plots,
  network_report,
)
from efficient_llm.diloco.network_config import (
  Group,
  NetworkConfig,
  Schedule,
)

_CONFIG = NetworkConfig(
  num_params=1_000_000_000,
  islands=6,
  groups=(
    Group('fast <&>', ('San Jose', 'London'), step_secs=1.0),
    Group('slow', ('Tokyo',), step_secs=2.0),
  ),
  schedule=Schedule(sync_period=20),
  num_rounds=4,
)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Where a simulation was written down."""
  folder = tmp_path_factory.mktemp('network')
  network_report.write(_CONFIG, workdir=folder)
  return folder


def test_the_result_holds_groups_that_add_up_to_the_whole(
  workdir: pathlib.Path,
) -> None:
  result = json.loads((workdir / 'result.json').read_text())
  groups = result['groups']
  assert [group['islands'] for group in groups] == [3, 3]
  for name in ('tokens_per_day', 'bytes_sent_per_day'):
    assert sum(group[name] for group in groups) == pytest.approx(result[name])
  assert 0 < result['utilization'] < 1
  assert result['published']['streaming_table']['cells'] == 75
  assert result['config']['schedule']['sync_period'] == 20


def test_the_page_shows_map_timeline_and_what_was_published(
  workdir: pathlib.Path,
) -> None:
  page = (workdir / 'report.html').read_text()
  assert page.count('<svg') == 3
  for text in ('San Jose', 'INTELLECT-1', 'predicted', 'Links by use'):
    assert text in page
  # Colours are the page's own, for light and for dark.
  assert not re.findall(r'#0a01|#0102|#0405', page)


def test_the_page_escapes_what_a_configuration_says(
  workdir: pathlib.Path,
) -> None:
  assert 'fast <&>' not in (workdir / 'report.html').read_text()


def test_options_are_simulated_one_change_at_a_time() -> None:
  options = {o.name: o for o in network_report.options(_CONFIG)}
  now = options['as configured']
  assert now.utilization == network.simulate(_CONFIG).total_utilization
  assert options['twice the sync period'].utilization > now.utilization
  assert options['half the sync period'].utilization < now.utilization
  assert options['4 bits a parameter'].utilization > now.utilization
  assert {'through a hub', 'steps by speed'} <= options.keys()


def test_an_option_that_changes_nothing_or_does_not_fit_is_left_out() -> None:
  schedule = Schedule(sync_period=4, overlap_steps=2, bits_per_parameter=4.0)
  config = dataclasses.replace(_CONFIG, schedule=schedule)
  names = [option.name for option in network_report.options(config)]
  assert '4 bits a parameter' not in names
  assert 'half the sync period' not in names
  assert 'twice the sync period' in names


def test_a_great_circle_begins_and_ends_at_its_cities() -> None:
  start, end = cities.find('London'), cities.find('Dallas')
  longitude, latitude = network_plots.arc(start, end)
  assert (longitude[0], latitude[0]) == pytest.approx((-0.1, 51.5))
  assert (longitude[-1], latitude[-1]) == pytest.approx((-96.8, 32.8))
  # It leads over the north, as flights do.
  assert latitude.max() > 52


def test_a_link_across_the_date_line_is_broken_there() -> None:
  longitude, latitude = network_plots.arc(
    cities.find('Tokyo'), cities.find('San Jose')
  )
  gaps = np.flatnonzero(np.isnan(longitude))
  assert len(gaps) == 1
  assert np.isnan(latitude[gaps]).all()
  steps = np.abs(np.diff(longitude))
  assert np.nanmax(steps) < 10


def test_busier_links_are_drawn_in_other_colours() -> None:
  def drawing(busy: float) -> str:
    route = network_exchange.Route(
      cities.find('London'), cities.find('Dallas'), 0.1, 1.0, 1.0, busy
    )
    return network_plots.RouteMap('map', (route,)).render().split('<svg')[1]

  used = [
    set(re.findall(r'--series-\d', drawing(busy)))
    for busy in (0.05, 0.3, 0.7, 0.95)
  ]
  assert all(len(colours) == 1 for colours in used)
  assert len(set.union(*used)) == 4


def test_the_timeline_has_a_row_for_each_island_that_is_shown() -> None:
  outcome = network.simulate(_CONFIG, max_shown=4)
  names = network_plots.island_names(outcome)
  assert len(names) == 4
  assert names[0].endswith('1s a step')
  assert names[-1].endswith('2s a step')
  page = network_plots.Timeline('time', outcome, names).render()
  assert all(name in page for name in names)
  # Fast islands wait for slow ones, so that all three kinds are drawn.
  for index in (0, 1, 2):
    assert f'fill: var(--series-{index})' in page


def test_ten_thousand_islands_make_a_page_of_ordinary_size(
  tmp_path: pathlib.Path,
) -> None:
  group = Group('home', ('Dallas', 'London', 'Tokyo'), step_spread=0.3)
  config = NetworkConfig(
    num_params=10_000_000,
    islands=10_000,
    groups=(group,),
    schedule=Schedule(
      all_reduce='hub', num_fragments=10, hub_gbits=100.0, stragglers='match'
    ),
    transport=links.Transport(),
    num_rounds=3,
  )
  network_report.write(config, workdir=tmp_path)
  assert (tmp_path / 'report.html').stat().st_size < 2_000_000
