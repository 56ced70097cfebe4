"""Tests of islands on several devices: same numbers, and what crosses them."""

from typing import Any

import pytest

from tests import simulated_devices

_FORMATS = pytest.mark.parametrize('format', ['float32', 'int4'])


@pytest.fixture(scope='module')
def eight() -> dict[str, Any]:
  """What `tests/diloco/eight_devices.py` found."""
  return simulated_devices.run('tests.diloco.eight_devices')


@_FORMATS
def test_islands_on_devices_of_their_own_train_as_on_one(
  eight: dict[str, Any], format: str
) -> None:
  assert eight['num_devices'] == 8
  assert eight[format]['moved'] > 0.1
  # Rounding of gradients, made larger by Adam's first steps.
  assert eight[format]['params'] < 1e-4
  assert eight[format]['islands'] < 2e-4


@_FORMATS
def test_nothing_crosses_islands_in_an_inner_step(
  eight: dict[str, Any], format: str
) -> None:
  assert eight[format]['crossing']['inner'] == []
  # The same search finds what does cross in a sync.
  assert eight[format]['crossing']['send']


def test_a_sync_moves_updates_as_they_were_encoded(
  eight: dict[str, Any],
) -> None:
  moved = {
    format: sum(sent for _, sent in eight[format]['crossing']['send'])
    for format in ('float32', 'int4')
  }
  # An island's two devices send half each to the three others.
  assert moved['float32'] < 1.1 * 3 * eight['float32']['sent_bytes'] / 2
  # Tables smaller than a block per device are sent by both.
  assert moved['int4'] < 0.3 * moved['float32']
