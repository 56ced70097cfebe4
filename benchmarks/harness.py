"""What every benchmark shares: fair timing, and a record that says where."""

import datetime
import json
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from efficient_llm.training import page, report, sections

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / 'benchmarks' / 'results'


def record(name: str, result: Mapping[str, Any]) -> None:
  """Stores a result with where it was measured and prints it on one line.

  Args:
    name: Of the benchmark, and of the file under `benchmarks/results/`.
    result: What JSON can hold. It must not use the keys added here:
      benchmark, device, versions, commit and date.

  Raises:
    ValueError: If it does.
  """
  added = {
    'benchmark': name,
    'device': _device(),
    'versions': _versions(),
    'commit': commit(),
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }
  if taken := sorted(set(added) & set(result)):
    raise ValueError(f'result must not hold {taken}, added here; rename them.')
  document = {**added, **result}
  _RESULTS.mkdir(exist_ok=True)
  text = json.dumps(document, indent=1, allow_nan=False) + '\n'
  (_RESULTS / f'{name}.json').write_text(text, encoding='utf-8')
  print(json.dumps(document), flush=True)


def picture(
  name: str, title: str, parts: Sequence[sections.Section]
) -> pathlib.Path:
  """Writes a page beside the record of the same name; gives its path."""
  _RESULTS.mkdir(exist_ok=True)
  path = _RESULTS / f'{name}.html'
  path.write_text(page.render(title, parts), encoding='utf-8')
  return path


def alternate(
  arms: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
  """Times each arm once a round, every other round in reverse order.

  Arms that take turns meet the same heat and the same neighbours; a drift of
  the machine then widens the spread instead of favouring one of them. What an
  arm returns is waited for. Compile and warm up before.

  Returns:
    Seconds by arm, one entry a round.
  """
  seconds: dict[str, list[float]] = {name: [] for name in arms}
  for round_index in range(rounds):
    order = list(arms)[:: 1 if round_index % 2 == 0 else -1]
    for name in order:
      start = time.perf_counter()
      jax.block_until_ready(arms[name]())
      seconds[name].append(time.perf_counter() - start)
  return seconds


def _device() -> dict[str, Any]:
  devices = jax.devices()
  return {
    'platform': devices[0].platform,
    'kind': devices[0].device_kind,
    'count': len(devices),
    'cpu': _cpu_model(),
  }


def _cpu_model() -> str:
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    for line in cpuinfo.read_text(encoding='utf-8').splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
  versions = report.environment()['versions']
  known = {name: version for name, version in versions.items() if version}
  return {'python': platform.python_version(), **known}


def commit() -> dict[str, Any]:
  """The commit measured; `dirty` says that the files differ from it."""

  def git(*arguments: str) -> str | None:
    try:
      done = subprocess.run(
        ['git', '-C', str(_ROOT), *arguments],
        capture_output=True,
        text=True,
        check=True,
      )
    except (FileNotFoundError, subprocess.CalledProcessError):
      return None  # not a checkout, or one without a commit
    return done.stdout.strip()

  status = git('status', '--porcelain')
  return {
    'hash': git('rev-parse', '--verify', 'HEAD'),
    'dirty': None if status is None else bool(status),
  }
