import json
import pathlib
import time
from typing import Any

import numpy as np
import pytest

from efficient_llm.diloco import fragments
from efficient_llm.diloco.wan import hub as hub_lib
from efficient_llm.diloco.wan import island as island_lib
from efficient_llm.diloco.wan import status, status_page, trainer
from efficient_llm.diloco.wan.config import RoundConfig
from tests import tiny
from tests.diloco.wan import local_run

_ROUNDS = RoundConfig(
  grace_secs=60.0, deadline_secs=90.0, patience_secs=60.0, match_speeds=False
)


class _Trainer(trainer.Trainer):
  """Notes where in the run its steps are."""

  def __init__(self, *args: Any):
    super().__init__(*args)
    self.ats: list[int] = []

  def step(self, at: int) -> trainer.Step:
    self.ats.append(at)
    return super().step(at)


@pytest.mark.parametrize(
  'overlap', [1, pytest.param(0, marks=pytest.mark.slow)]
)
def test_islands_train_to_the_end_and_agree_with_the_hub(
  tmp_path: pathlib.Path, overlap: int
) -> None:
  text = tiny.write_text(tmp_path / 'text')
  config = local_run.config(
    text,
    fragments=fragments.FragmentConfig(overlap_steps=overlap, mixing=0.0),
    rounds=_ROUNDS,
  )
  config.validate()
  (tmp_path / 'hub').mkdir()
  hub = hub_lib.Hub(config, tmp_path / 'hub', clock=time.time)
  islands, trainers = {}, []
  for i in range(2):
    batches = local_run.batches(config, tmp_path / 'cache', share=(i, 2))
    trainers.append(_Trainer(config, batches))
    island = island_lib.Island(config, trainers[-1])
    islands[f'island-{i}'] = (island, local_run.DirectLink(island))
  outcomes = local_run.run(hub, islands)
  hub.close()

  assert hub.is_done
  assert sum(hub.shared.versions_P) == hub.slot
  assert hub.counts['digest_mismatches'] == 0
  lines = (tmp_path / 'hub' / 'rounds.jsonl').read_text().splitlines()
  rounds = [json.loads(line) for line in lines]
  assert [x['version'] for x in rounds if 'version' in x] == [1, 2, 3, 4]
  for name, (island, _) in islands.items():
    for p, theta in enumerate(hub.shared.theta_P):
      for leaf, x in theta.items():
        np.testing.assert_array_equal(island._exchange.theta_P[p][leaf], x)
    assert outcomes[name].steps >= 12
    if overlap:
      assert outcomes[name].waiting_secs == 0
  for found in trainers:
    # However many steps it makes, none is beyond the round that is open.
    assert found.ats == sorted(found.ats)
    assert 9 <= found.ats[-1] <= config.loop.num_steps
  now = status.status(hub)
  assert now['tokens'] == hub.tokens > 0
  assert 'What islands do' in status_page.render(hub)
