"""What is said at the top of the result, and where nothing can be measured."""

import os
from typing import Any

import pytest

from benchmarks import wan_links, wan_utilisation
from experiments import flower_programs


def _row(utilisation: float, bytes_error: float = 0.01) -> dict[str, Any]:
  return {'utilisation': utilisation, 'bytes_error': bytes_error}


def test_the_largest_miss_is_told_whichever_way_it_goes() -> None:
  plan = wan_utilisation.Plan(
    wan_utilisation._SETTINGS, islands=8, dilation=40.0, periods=1
  )
  found = wan_utilisation.summary(
    {
      'blocking_int8': {
        'usa': _row(95.2),
        'usa_europe': _row(86.0),
        'global': _row(81.5, 0.04),
      },
      'streaming_int4': {
        'usa': _row(99.0),
        'usa_europe': _row(98.0),
        'global': _row(97.0),
      },
    },
    plan,
    num_params=1,
    delay='netem',
  )
  assert found['blocking_error_points'] == pytest.approx(1.5)
  assert found['errors_points']['usa_europe'] == pytest.approx(0.4)
  assert found['streaming_int4_min'] == 97.0
  assert found['bytes_error'] == 0.04


def test_without_root_it_is_skipped_with_the_reason(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setattr(os, 'geteuid', lambda: 1000)
  monkeypatch.setattr(flower_programs, 'check_installed', lambda: None)
  wan_utilisation.main([])
  assert capsys.readouterr().out == ('skipped: network namespaces need root\n')


@pytest.mark.skipif(os.geteuid() != 0, reason='needs root')
def test_links_carry_what_their_counters_count_and_are_gone_after() -> None:
  with wan_links.Rig(2) as rig:
    rig.set_link(0, wan_links.Link(1e6, 0.01))
    before = rig.num_bytes()
    code = (
      'import socket\n'
      's = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n'
      f"[s.sendto(bytes(1000), ('{wan_links.HUB_ADDRESS}', 9)) for _ in '1234']"
    )
    wan_links._run(*rig.inside(0, ['python3', '-c', code]))
    after = rig.num_bytes()
    prefix = rig._prefix
    assert list(wan_links._NAMESPACES.glob(f'{prefix}*'))
  # Four packets of 1000 bytes, with 28 of IP and UDP.
  assert after[0][0] - before[0][0] == 4 * 1028
  assert after[1] == before[1]
  assert not list(wan_links._NAMESPACES.glob(f'{prefix}*'))
