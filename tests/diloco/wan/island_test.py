import json
import pathlib
import time
from typing import Any

import numpy as np
import pytest

from efficient_llm.diloco import fragments
from efficient_llm.diloco.wan import hub as hub_lib
from efficient_llm.diloco.wan import island as island_lib
from efficient_llm.diloco.wan import (
  shared_model,
  status,
  status_page,
  trainer,
)
from efficient_llm.diloco.wan.config import RoundConfig
from tests import tiny
from tests.diloco.wan import local_run, talk

_ROUNDS = RoundConfig(
  grace_secs=60.0, deadline_secs=90.0, patience_secs=60.0, match_speeds=False
)


class _Steps:
  """Training that only says where it is."""

  def __init__(self, start: Any):
    self.ats: list[int] = []
    self._own = start

  @property
  def position(self) -> int:
    return len(self.ats)

  def begin(self, position: int) -> None:
    assert position == 0

  def step(self, at: int) -> trainer.Step:
    self.ats.append(at)
    return trainer.Step(1.0, 64.0)

  def own(self, fragment: int) -> Any:
    return self._own[fragment]

  def put(self, fragment: int, values: Any, **how: Any) -> None:
    del how
    self._own[fragment] = values


class _Ear:
  """A link that is always open; keeps what the island says."""

  def __init__(self) -> None:
    self.said: list[bytes] = []

  def poll(self, secs: float = 0.0) -> None:
    del secs

  def claim(self) -> bool:
    return True

  def answer(self, frame: bytes) -> None:
    self.said.append(frame)


def test_orders_that_are_repeated_do_not_turn_the_schedule_back(
  tmp_path: pathlib.Path,
) -> None:
  chat = talk.Talk(talk.config(), tmp_path / 'hub')
  start = shared_model.cut(
    chat.config, shared_model.initial_params(chat.config)
  )
  steps, link = _Steps(start), _Ear()
  island = island_lib.Island(chat.config, steps)

  def hear() -> None:
    frame = chat.hub.next_message('x')
    assert frame is not None
    island._obey(frame, link)

  chat.hub.appeared('x')
  hear()
  chat.hub.receive('x', link.said.pop())
  hear()
  for _ in range(3):
    island._step()
  alive = island.idle()
  assert alive is not None
  chat.hub.receive('x', alive)
  hear()
  island._step()
  assert steps.ats == [0, 1, 2, 3]


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
