"""The page of a hub, as it is served and as a browser shows it."""

import json
import pathlib
import urllib.error
import urllib.request

import pytest

from efficient_llm.diloco.wan import status_page
from tests import browser
from tests.diloco.wan import talk


@pytest.fixture
def chat(tmp_path: pathlib.Path) -> talk.Talk:
  """Three islands after two rounds, of which one was refused."""
  found = talk.Talk(talk.config(), tmp_path / 'hub')
  for name in 'abc':
    found.join(name)
  signs = talk.SIGNS | {'spans': [['compute', 1.0, 5.0], ['sending', 4.0, 6.0]]}
  for now in (10.0, 20.0):
    found.now = now
    for name in 'abc':
      found.train(name)
      frame = found.islands[name].alive(signs)
      found.hub.receive(name, frame)
      found.hub.next_message(name)
    found.round(*'abc')
  found.hub.receive('c', b'noise')
  return found


def test_the_numbers_are_served_and_nothing_else(chat: talk.Talk) -> None:
  with status_page.serving(chat.hub, '127.0.0.1:0') as address:
    with urllib.request.urlopen(f'http://{address}/status.json') as reply:
      found = json.load(reply)
    with pytest.raises(urllib.error.HTTPError, match='404'):
      urllib.request.urlopen(f'http://{address}/../hub.key')
  assert found['round'] == 2
  assert [x['name'] for x in found['islands']] == ['a', 'b', 'c']
  assert found['counts']['refused'] == 1


@pytest.mark.slow
def test_a_browser_shows_the_page_on_screens_of_all_widths(
  chat: talk.Talk, tmp_path: pathlib.Path
) -> None:
  with status_page.serving(chat.hub, '127.0.0.1:0') as address:
    shown = browser.show(f'http://{address}/')
  for text in ('What islands do', '2 of 8', 'must begin with ISL1', '<svg'):
    assert text in shown
  page = tmp_path / 'page.html'
  page.write_text(status_page.render(chat.hub), encoding='utf-8')
  for width in (1280, 390):
    browser.check_page(page, width=width)
