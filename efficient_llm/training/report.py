"""The end of a run: result.json for programs, report.html for people."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from efficient_llm.training import (
  chart,
  metrics,
  page,
  sections,
  strict_json,
  units,
)

# What is counted where a result does not say.
_TOKENS = 'tokens'
_PACKAGES = (
  'efficient_llm',
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'numpy',
)


def write_result(
  workdir: str | os.PathLike[str], result: Mapping[str, Any]
) -> pathlib.Path:
  """Writes `workdir`/result.json in one piece, with what it was made by.

  To `result` it adds 'environment' (see `environment`) and 'finished', the
  time in UTC. The standard report reads, where present: unit (what counts as a
  token, such as 'images'), num_params, num_tokens, flops, train_secs,
  wall_secs, tokens_per_sec, eval_loss, eval_accuracy, bits_per_byte and samples
  (texts, or mappings with prompt and text).

  Args:
    workdir: Folder of the run; made if it does not exist.
    result: Anything `strict_json.to_json` takes.

  Returns:
    The path of the file.

  Raises:
    ValueError: If `result` has the added names, or holds what JSON cannot.
  """
  added = {
    'environment': environment(),
    'finished': datetime.datetime.now(datetime.UTC).isoformat(
      timespec='seconds'
    ),
  }
  clash = sorted(added.keys() & result.keys())
  if clash:
    raise ValueError(
      f'A result must not hold {clash[0]!r}, which is added here; rename it.'
    )
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'result.json'
  text = strict_json.to_json({**result, **added}, indent=2)
  strict_json.write_atomically(path, text + '\n')
  return path


def write_report(
  workdir: str | os.PathLike[str],
  *,
  title: str,
  sections: Sequence[sections.Section],
  subtitle: str = '',
) -> pathlib.Path:
  """Writes `workdir`/report.html: one file that needs no other and no network.

  Args:
    workdir: Folder of the run; made if it does not exist.
    title: Heading of the page.
    sections: What it shows, in this order.
    subtitle: A line below the title.

  Returns:
    The path of the file.
  """
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'report.html'
  strict_json.write_atomically(
    path, page.render(title, sections, subtitle=subtitle)
  )
  return path


def environment() -> dict[str, Any]:
  """Says what a result was made by: versions, devices, source and lock."""
  versions = {}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  root = pathlib.Path(__file__).parents[2]
  lock = root / 'requirements.lock'
  devices = jax.devices()
  return {
    'python': platform.python_version(),
    'versions': versions,
    'platform': platform.platform(),
    'device_platform': devices[0].platform,
    'device_kind': devices[0].device_kind,
    'device_count': len(devices),
    'process_count': jax.process_count(),
    'git_commit': git_commit(root),
    'lock_sha256': hashlib.sha256(lock.read_bytes()).hexdigest()
    if lock.exists()
    else None,
  }


def training_sections(
  workdir: str | os.PathLike[str],
) -> list[sections.Section]:
  """Builds what every training run shows, from the files in its folder.

  Reads metrics.jsonl, result.json and config.json; what is missing is left
  out, so a run that was stopped has a report too.
  """
  folder = pathlib.Path(workdir)
  has_metrics = (folder / 'metrics.jsonl').exists()
  records = metrics.read_metrics(folder) if has_metrics else []
  train = [record for record in records if record['kind'] == 'train']
  evals = [record for record in records if record['kind'] == 'eval']
  result = _read_json(folder / 'result.json')
  config = _read_json(folder / 'config.json')
  tiles = _tiles(train, evals, result)
  unit = result.get('unit', _TOKENS)
  built: list[sections.Section] = [*_charts(train, evals, unit)]
  if tiles:
    built.insert(0, sections.KeyNumbers(tiles))
  if result.get('samples'):
    built.append(sections.Samples([_sample(s) for s in result['samples']]))
  if config:
    built.append(sections.Configuration(config))
  if 'environment' in result:
    made_by = result['environment']
    built.append(
      sections.Configuration(
        {**made_by, 'finished': result.get('finished')},
        title='Versions and device',
      )
    )
  return built


def _tiles(
  train: list[dict[str, Any]],
  evals: list[dict[str, Any]],
  result: Mapping[str, Any],
) -> list[sections.Tile]:
  """Makes the key numbers; the result counts before the metrics."""
  last = evals[-1] if evals else {}
  loss = result.get('eval_loss', last.get('loss'))
  bits = result.get('bits_per_byte', last.get('bits_per_byte'))
  steps = train[-1]['step'] if train else None
  tokens = result.get('num_tokens', train[-1].get('tokens') if train else None)
  rates = [r['tokens_per_sec'] for r in train if 'tokens_per_sec' in r]
  rate = result.get(
    'tokens_per_sec', statistics.median(rates) if rates else None
  )
  params, flops = result.get('num_params'), result.get('flops')
  unit = result.get('unit', _TOKENS)
  tiles = []
  if loss is not None:
    tiles.append(sections.Tile('Validation loss', float(loss), 'nats'))
  elif train and 'loss' in train[-1]:
    tiles.append(sections.Tile('Training loss', train[-1]['loss'], 'nats'))
  if unit != _TOKENS and 'eval_accuracy' in result:
    text = f'{result["eval_accuracy"]:.2%}'
    tiles.append(sections.Tile('Validation accuracy', text))
  if bits is not None:
    tiles.append(sections.Tile('Validation', float(bits), 'bits per byte'))
  if params is not None:
    tiles.append(sections.Tile('Parameters', units.format_count(params)))
  if tokens is not None:
    tiles.append(sections.Tile('Trained on', units.format_count(tokens), unit))
  if steps is not None:
    tiles.append(sections.Tile('Steps', steps))
  if rate is not None:
    tiles.append(sections.Tile('Speed', units.format_count(rate), f'{unit}/s'))
  if flops is not None:
    text = f'{float(flops):.3g}'.replace('e+', 'e')
    tiles.append(sections.Tile('Compute', text, 'FLOPs'))
  for label, name in (
    ('Training time', 'train_secs'),
    ('Wall time', 'wall_secs'),
  ):
    if name in result:
      text = units.format_duration(float(result[name]))
      tiles.append(sections.Tile(label, text))
  return tiles


def _charts(
  train: list[dict[str, Any]], evals: list[dict[str, Any]], unit: str
) -> list[chart.Curve]:
  by_tokens = bool(train) and all('tokens' in record for record in train)
  x_label = unit if by_tokens else 'steps'
  steps = [0, *(record['step'] for record in train)]
  seen = [0, *(record['tokens'] for record in train)] if by_tokens else steps

  def series(label: str, records: list[dict[str, Any]], name: str):
    kept = [record for record in records if name in record]
    x = np.interp([record['step'] for record in kept], steps, seen)
    return chart.Series(label, x.tolist(), [record[name] for record in kept])

  curves = [
    chart.Curve(
      'Loss',
      [series('training', train, 'loss'), series('validation', evals, 'loss')],
      x_label,
      f'nats per {unit.removesuffix("s")}',
      note=_non_finite_note(train),
    )
  ]
  if unit != _TOKENS:
    accuracy = [
      series('training', train, 'accuracy'),
      series('validation', evals, 'accuracy'),
    ]
    curves.append(chart.Curve('Accuracy', accuracy, x_label, 'share'))
  for title, name, y_label, from_zero in (
    ('Throughput', 'tokens_per_sec', f'{unit} per second', True),
    ('Utilisation', 'mfu', 'model FLOPs over peak FLOPs (MFU)', True),
    ('Learning rate', 'learning_rate', '', True),
    ('Gradient norm', 'grad_norm', 'before clipping', False),
  ):
    one = series(title.lower(), train, name)
    if one.y:
      curves.append(
        chart.Curve(title, [one], x_label, y_label, from_zero=from_zero)
      )
  return curves


def _non_finite_note(train: list[dict[str, Any]]) -> str:
  steps = [r['step'] for r in train if not np.isfinite(r.get('loss', 0.0))]
  if not steps:
    return ''
  return f'The loss was not finite at {len(steps)} steps, first {steps[0]}.'


def _sample(sample: Any) -> sections.Sample:
  if isinstance(sample, Mapping):
    return sections.Sample(
      str(sample.get('text', '')), prompt=str(sample.get('prompt', ''))
    )
  return sections.Sample(str(sample))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}


def git_commit(root: pathlib.Path) -> str | None:
  """Returns the checkout's commit, marked where files differ from it."""
  # An installed copy may lie inside somebody else's repository.
  if not (root / '.git').exists():
    return None
  try:
    described = subprocess.run(
      ('git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'),
      cwd=root,
      capture_output=True,
      text=True,
      timeout=10,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  return described.stdout.strip() or None
