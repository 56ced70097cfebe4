"""A hub and two islands on this machine, over TLS, as users start them."""

import json
import pathlib

import pytest

from tests import binary, tiny

pytest.importorskip('flwr', reason='needs the extra [wan]')


@pytest.mark.slow
def test_two_islands_train_with_a_hub(tmp_path: pathlib.Path) -> None:
  text = tiny.write_text(tmp_path / 'text')
  workdir = tmp_path / 'run'
  process = binary.start(
    [
      '--local=2',
      f'--workdir={workdir}',
      f'--config.data.path={text}',
      '--config.data.batch_size=2',
      '--config.loop.num_steps=60',
      '--config.sync_period=20',
      '--page=127.0.0.1:0',
    ],
    cache=tmp_path / 'programs',
    module='experiments.islands',
  )
  output, errors = process.communicate(timeout=600)
  assert process.returncode == 0, output + errors
  status = json.loads((workdir / 'hub' / 'status.json').read_text())
  assert status['round'] == status['rounds'] == 6
  assert status['counts']['rounds_lost'] == 0
  assert status['counts']['digest_mismatches'] == 0
  assert status['tokens'] > 0
  for i in range(2):
    result = json.loads((workdir / f'island-{i}' / 'result.json').read_text())
    assert result['steps'] > 0


def test_an_island_without_a_key_is_told_so_in_one_line(
  tmp_path: pathlib.Path,
) -> None:
  process = binary.start(
    [f'--workdir={tmp_path}', '--hub=127.0.0.1:1'],
    cache=tmp_path / 'programs',
    module='experiments.island',
  )
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 2
  assert errors.splitlines()[-1].startswith('error: --key is missing')
