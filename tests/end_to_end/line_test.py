"""The line goes on in the stage it was in; a whole one, killed and not."""

import json
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import end_to_end as benchmark
from efficient_llm.end_to_end import line, page, stages, summary
from efficient_llm.training import task
from tests import browser
from tests.end_to_end import tiny_line


class Stages:
  """Stands for the real ones: each counts its calls."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch):
    self.calls: list[str] = []
    self.happenings: dict[str, Callable[[], Any]] = {}
    monkeypatch.setattr(stages.Line, 'stages', lambda _: self._make())
    monkeypatch.setattr(summary, 'make', lambda _, secs: {'stages': secs})
    monkeypatch.setattr(page, 'write', lambda *_: None)

  def _make(self) -> list[stages.Stage]:
    return [
      stages.Stage(
        name, name.title(), lambda name=name: self._run(name), str, 1e9
      )
      for name in ('predict', 'grow', 'reason')
    ]

  def _run(self, name: str) -> task.Outcome | None:
    self.calls.append(name)
    return self.happenings.pop(name, lambda: None)()


def _stopped() -> task.Outcome:
  return task.Outcome(
    state=None,
    stopped_by='SIGTERM',
    num_tokens=0,
    train_secs=0.0,
    eval_metrics={},
  )


def test_a_stopped_line_goes_on_in_its_stage(
  monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
  fake = Stages(monkeypatch)
  fake.happenings['grow'] = _stopped
  said: list[str] = []
  outcome = line.run(tiny_line.config(), workdir=tmp_path, say=said.append)
  assert outcome is not None
  assert outcome.stopped_by == 'SIGTERM'
  assert not (tmp_path / 'result.json').exists()
  assert line.run(tiny_line.config(), workdir=tmp_path, say=said.append) is None
  assert fake.calls == ['predict', 'grow', 'grow', 'reason']
  assert said[0] == '[1/3] Predict'
  assert 'left' in said[2]
  found = json.loads((tmp_path / 'result.json').read_bytes())
  assert list(found['stages']) == ['predict', 'grow', 'reason']


def test_time_counts_in_calls_that_were_cut_short_too(
  monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
  fake = Stages(monkeypatch)

  def crash() -> None:
    time.sleep(0.3)
    folder = tmp_path / 'growth'
    folder.mkdir()
    (folder / 'metrics.jsonl').write_text('')
    raise RuntimeError('killed')

  fake.happenings['grow'] = crash
  with pytest.raises(RuntimeError):
    line.run(tiny_line.config(), workdir=tmp_path, say=lambda _: None)
  line.run(tiny_line.config(), workdir=tmp_path, say=lambda _: None)
  found = json.loads((tmp_path / 'result.json').read_bytes())['stages']
  assert found['grow'] > 0.25
  assert found['reason'] < 0.25


def test_a_folder_of_another_line_is_refused(
  monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
  fake = Stages(monkeypatch)
  line.run(tiny_line.config(), workdir=tmp_path, say=lambda _: None)
  with pytest.raises(ValueError, match='another configuration'):
    line.run(tiny_line.config('other'), workdir=tmp_path, say=lambda _: None)
  assert len(fake.calls) == 3


@pytest.mark.slow
def test_a_killed_line_ends_with_the_same_report(
  tmp_path: pathlib.Path,
) -> None:
  def start(name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
      [
        sys.executable,
        '-m',
        'tests.end_to_end.tiny_line',
        str(tmp_path / name),
      ]
    )

  begun = time.time()
  assert start('whole').wait() == 0
  secs = time.time() - begun
  rng = random.Random(0)
  for _ in range(5):
    process = start('killed')
    try:
      process.wait(rng.uniform(2, secs / 2))
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
  assert start('killed').wait() == 0
  found = [
    json.loads((tmp_path / name / 'result.json').read_bytes())
    for name in ('whole', 'killed')
  ]
  assert not benchmark.differences(*found)
  assert found[0]['stages'].keys() == found[1]['stages'].keys()
  pages = [
    (tmp_path / name / 'report.html').read_text(encoding='utf-8')
    for name in ('whole', 'killed')
  ]
  for text in pages:
    for heading in ('Predicted and achieved', 'Beside its baseline', 'Stages'):
      assert heading in text
    assert 'No data was recorded' not in text
    # Self-contained: nothing is fetched.
    assert 'src=' not in text
    assert '://' not in text.split('<main>')[0]
  for width in (1280, 390):
    browser.check_page(tmp_path / 'whole' / 'report.html', width=width)
