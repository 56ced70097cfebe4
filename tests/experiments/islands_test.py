"""A hub and two islands on this machine, over TLS, as users start them."""

import json
import pathlib
import shutil
import time
from typing import Any

import pytest

from efficient_llm.training import trained_run
from experiments.configs import islands_cpu
from tests import binary, tiny

_REASON = 'needs the extra [wan]'
pytest.importorskip('flwr', reason=_REASON)
keys: Any = pytest.importorskip('efficient_llm.diloco.wan.keys', reason=_REASON)
hub_lib: Any = pytest.importorskip(
  'efficient_llm.diloco.wan.hub', reason=_REASON
)


def test_two_islands_train_with_a_hub_and_never_wait_for_it(
  tmp_path: pathlib.Path,
) -> None:
  text = tiny.write_text(tmp_path / 'text')
  workdir = tmp_path / 'run'
  process = binary.start(
    [
      '--local=2',
      f'--workdir={workdir}',
      f'--config.data.path={text}',
      '--config.data.batch_size=2',
      '--config.loop.num_steps=40',
      '--config.sync_period=20',
      '--config.rounds.ask_secs=0.2',
      '--page=127.0.0.1:0',
    ],
    cache=tmp_path / 'programs',
    module='experiments.islands',
  )
  output, errors = process.communicate(timeout=600)
  assert process.returncode == 0, output + errors
  status = json.loads((workdir / 'hub' / 'status.json').read_text())
  assert status['round'] == status['rounds'] == 4
  assert sum(status['versions']) == 4
  assert status['counts']['digest_mismatches'] == 0
  assert status['tokens'] > 0
  model = trained_run.find(workdir / 'hub', name='--checkpoint')
  assert model.step == 4
  for i in range(2):
    result = json.loads((workdir / f'island-{i}' / 'result.json').read_text())
    assert result['steps'] > 0
    assert result['waiting_secs'] == 0
  for island in status['islands']:
    spans = [tuple(span) for span in island['spans']]
    assert {kind for kind, _, _ in spans} == {'compute', 'sending'}
    # Encoding and applying take some of the time, and clocks are compared.
    assert _share_computed(spans) > 0.5


@pytest.mark.slow
def test_a_folder_of_another_configuration_is_refused_in_one_line(
  tmp_path: pathlib.Path,
) -> None:
  folder = tmp_path / 'keys'
  keys.make(folder, hosts=[], islands=['known'])
  config = islands_cpu.get_config()
  hub = hub_lib.Hub(config, tmp_path / 'hub', clock=time.time)
  hub.close()
  process = binary.start(
    [
      f'--keys={folder}',
      '--listen=127.0.0.1',
      f'--port={binary.free_port()}',
      '--page=',
      f'--workdir={tmp_path / "hub"}',
      f'--config.seed={config.seed + 1}',
    ],
    cache=tmp_path / 'programs',
    module='experiments.island_hub',
  )
  code, out, err = binary.finish(process)
  assert code == 2, out + err
  line = err.splitlines()[-1]
  assert line.startswith(f'error: --workdir={tmp_path / "hub"} holds a run of')


@pytest.mark.slow
def test_an_island_whose_key_the_hub_does_not_know_is_refused(
  tmp_path: pathlib.Path,
) -> None:
  folder = tmp_path / 'keys'
  keys.make(folder, hosts=[], islands=['known'])
  keys.make(tmp_path / 'other', hosts=[], islands=['stranger'])
  # The hub vouches for itself to it, but has no public half of its key.
  key = shutil.copy(
    tmp_path / 'other' / 'islands' / 'stranger.key', folder / 'islands'
  )
  port = binary.free_port()
  hub = binary.start(
    [
      f'--keys={folder}',
      '--listen=127.0.0.1',
      f'--port={port}',
      '--page=',
      f'--workdir={tmp_path / "hub"}',
    ],
    cache=tmp_path / 'programs',
    module='experiments.island_hub',
  )
  try:
    island = binary.start(
      [
        f'--hub=127.0.0.1:{port}',
        f'--key={key}',
        f'--data={tiny.write_text(tmp_path / "text")}',
        f'--workdir={tmp_path / "stranger"}',
      ],
      cache=tmp_path / 'programs',
      module='experiments.island',
    )
    code, out, err = binary.finish(island)
  finally:
    hub.terminate()
    hub.communicate()
  assert (code, out) == (2, ''), err
  line = err.splitlines()[-1]
  assert line.startswith(f'error: --hub=127.0.0.1:{port} does not let --key=')
  assert 'Traceback' not in err


def _share_computed(spans: list[tuple[str, float, float]]) -> float:
  """Share of the time of round trips in which an island computed."""
  trips = [(start, end) for kind, start, end in spans if kind == 'sending']
  steps = [(start, end) for kind, start, end in spans if kind == 'compute']
  both = sum(
    max(0.0, min(end, stop) - max(start, begin))
    for start, end in trips
    for begin, stop in steps
  )
  return both / sum(end - start for start, end in trips)


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
