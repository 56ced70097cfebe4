"""READ FIRST. The main job: ladder, prediction, growth, islands, reasoning.

`run` goes through the stages of `stages`, each a run of its own that continues
where it stands, and ends with result.json and report.html of the whole
(`summary`, `page`). What is done is written to stages.json, so that the same
command goes on in the stage that was stopped.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from efficient_llm.end_to_end import page, summary
from efficient_llm.end_to_end import stages as stages_lib
from efficient_llm.end_to_end.config import EndToEndConfig
from efficient_llm.training import processes, report, strict_json, task, units

FILE_NAME = 'stages.json'
# A stage compiles, opens its text and writes a report besides.
_OVERHEAD_SECS = 12.0


def run(
  config: EndToEndConfig,
  *,
  workdir: str | pathlib.Path,
  say: Callable[[str], None] = print,
) -> task.Outcome | None:
  """Runs all stages that are not done, and writes result.json, report.html.

  Args:
    config: The line.
    workdir: Its folder; the same continues it.
    say: Shows which stage runs and what the one before found.
  Returns:
    How the stage ended that a signal interrupted; None when all is done.
  Raises:
    ValueError: If the configuration will not do, or the folder holds a line of
      another.
  """
  config.validate()
  workdir = pathlib.Path(workdir).absolute()
  line = stages_lib.Line(config, workdir)
  stages = line.stages()
  record = _Record(workdir, config)
  for number, stage in enumerate(stages, 1):
    if record.is_done(stage.name):
      continue
    left = _left(stages, record)
    title = f'[{number}/{len(stages)}] {stage.title}'
    if left is not None:
      title += f', about {units.format_duration(left)} left'
    say(title)
    start = time.time()
    record.begin(stage.name, start)
    outcome = stage.run()
    stopped = outcome is not None and outcome.stopped_by is not None
    record.end(stage.name, time.time(), is_done=not stopped)
    if stopped:
      return outcome
    found = processes.on_first(stage.tell)
    say(f'      {found} ({units.format_duration(record.secs(stage.name))})')
  if jax.process_index() == 0:
    result = summary.make(line, record.all_secs())
    report.write_result(workdir, result)
    page.write(line, result)
  return None


def _left(
  stages: Sequence[stages_lib.Stage], record: '_Record'
) -> float | None:
  """Seconds that are left, at the speed so far; None before the first stage."""
  done = [x for x in stages if record.is_done(x.name) and x.flops]
  if not done:
    return None
  secs = sum(max(1.0, record.secs(x.name) - _OVERHEAD_SECS) for x in done)
  rate = sum(x.flops for x in done) / secs
  return sum(
    _OVERHEAD_SECS + x.flops / rate
    for x in stages
    if not record.is_done(x.name)
  )


class _Record:
  """What is done and how long it took, over all calls; stages.json."""

  def __init__(self, workdir: pathlib.Path, config: EndToEndConfig):
    self._path = workdir / FILE_NAME
    found = processes.on_first(
      lambda: (
        json.loads(self._path.read_bytes()) if self._path.is_file() else None
      )
    )
    text = strict_json.to_json(dataclasses.asdict(config))
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    self._data: dict[str, Any] = found or {'config': digest, 'stages': {}}
    if self._data['config'] != digest:
      raise ValueError(
        f'--workdir={workdir} holds a line of another configuration, whose '
        'stages would not fit together; choose another.'
      )
    self._stages = self._data['stages']

  def is_done(self, name: str) -> bool:
    return self._stages.get(name, {}).get('is_done', False)

  def secs(self, name: str) -> float:
    return self._stages[name]['secs']

  def all_secs(self) -> dict[str, float]:
    """Seconds of every stage, those of calls that were cut short included."""
    return {name: x['secs'] for name, x in self._stages.items()}

  def begin(self, name: str, now: float) -> None:
    """Notes that a stage runs from now on."""
    entry = self._stages.setdefault(name, {'secs': 0.0, 'is_done': False})
    if 'begun' in entry:
      # Killed: it ran until its folder was last written to, or longer.
      entry['secs'] += max(0.0, self._last_write() - entry['begun'])
    entry['begun'] = now
    self._write()

  def end(self, name: str, now: float, *, is_done: bool) -> None:
    """Notes that it ended by itself."""
    entry = self._stages[name]
    entry['secs'] += now - entry.pop('begun')
    entry['is_done'] = is_done
    self._write()

  def _last_write(self) -> float:
    files = (
      path
      for pattern in ('*/metrics.jsonl', '*/*/metrics.jsonl')
      for path in self._path.parent.glob(pattern)
    )
    return max((path.stat().st_mtime for path in files), default=0.0)

  def _write(self) -> None:
    if jax.process_index() == 0:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      text = strict_json.to_json(self._data, indent=2)
      strict_json.write_atomically(self._path, text + '\n')
