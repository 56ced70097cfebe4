"""Learning curves of this project's own runs, as rows for the laws."""

import glob
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from efficient_llm.scaling import checks, data
from efficient_llm.training import metrics

# Sizes, tokens, losses and the run's name, one entry an evaluation.
_Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def read(pattern: str, *, family: str | None = None) -> data.Runs:
  """Learning curves of the runs that a pattern names.

  Args:
    pattern: Of result.json files, such as 'out/*/result.json'. What follows no
      law of training from nothing (drafters, grown models, reports
      that are not of training), what has no losses, and texts of which there
      is too little are left out, as `Runs.bad_rows` says.
    family: Only the runs on this text.
  Returns:
    One row for every evaluation in metrics.jsonl beside each, the last from
    result.json where there is no such file. Sizes are all parameters, tables
    of embeddings included; tokens are the targets trained on, repeats
    included; losses are those of the evaluation, in nats per token. Runs on
    one text, and as many islands, are a family.
  Raises:
    ValueError: If none is found, none can be used, some count in other units,
      or none is of the family.
  """
  paths = sorted(pathlib.Path(p) for p in glob.glob(pattern))
  if not paths:
    raise ValueError(f'runs={pattern} names no file; check the pattern.')
  results = {p: json.loads(p.read_text(encoding='utf-8')) for p in paths}
  curves: dict[str, dict[pathlib.Path, _Curve]] = {}
  bad = []
  for path, result in results.items():
    reason = _why_not(result)
    if reason is None:
      try:
        curve = _curve(path, result)
        curves.setdefault(_text(result), {})[path] = curve
      except ValueError as error:
        reason = str(error)
    if reason is not None:
      bad.append(data.BadRow(str(path), reason))
  if not curves:
    raise ValueError(
      f'runs={pattern} names no training run: {bad[0].line} {bad[0].reason}; '
      'name those of experiments.pretrain.'
    )
  if family is not None and family not in curves:
    raise ValueError(
      f'rows.family={family!r} must be one of {", ".join(sorted(curves))}.'
    )
  families = {
    text: _joined(text, found)
    for text, found in curves.items()
    if family in (None, text)
  }
  units = {
    str(results[path].get('unit', 'tokens'))
    for text in families
    for path in curves[text]
  }
  if len(units) > 1:
    raise ValueError(
      f'runs={pattern} must have one unit, not {", ".join(sorted(units))}; '
      'name the runs of one kind.'
    )
  refused = {text: checks.refusal(runs) for text, runs in families.items()}
  if not all(refused.values()):
    for text, reason in refused.items():
      if reason is not None:
        del families[text]
        bad += [
          data.BadRow(str(p), f'is too little: {reason}') for p in curves[text]
        ]
  parts = families.values()
  return data.make(
    *(
      np.concatenate([getattr(runs, name) for runs in parts])
      for name in ('num_params', 'num_tokens', 'loss')
    ),
    run=np.concatenate([runs.run for runs in parts]),
    family=np.concatenate([runs.family for runs in parts]),
    bad_rows=tuple(bad),
  )


def _why_not(result: Mapping[str, Any]) -> str | None:
  """Why the laws do not speak of it; None where they do."""
  for name in ('num_params', 'num_tokens'):
    if name not in result:
      return f'is not of a training run: it lacks {name}'
  if 'target' in result:
    return 'is of a drafter'
  if 'growth' in result:
    return 'did not begin from nothing: its model was grown'
  if result.get('config', {}).get('start'):
    return 'did not begin from nothing: it has a start'
  return None


def _text(result: Mapping[str, Any]) -> str:
  """What a run was trained on, how, and what its loss was measured on."""
  config = result.get('config', {}).get('data', {})
  sources = config.get('sources') or [config.get('path') or 'family']
  parts = [str(source) for source in sources]
  for name, usual in (
    ('tokenizer', 'bytes'),
    ('objective', 'causal'),
    ('validation_path', None),
  ):
    if config.get(name, usual) != usual:
      parts.append(str(config[name]))
  if 'islands' in result:
    # Which learn less from as many tokens.
    parts.append(f'on {result["islands"]} islands')
  return ' '.join(parts)


def _joined(text: str, curves: Mapping[pathlib.Path, _Curve]) -> data.Runs:
  sizes, tokens, loss, names = (
    np.concatenate(column) for column in zip(*curves.values(), strict=True)
  )
  return data.make(sizes, tokens, loss, run=names, family=text)


def _curve(path: pathlib.Path, result: Mapping[str, Any]) -> _Curve:
  points: dict[float, float] = {}
  if (path.parent / metrics.FILE_NAME).is_file():
    records = metrics.read_metrics(path.parent)
    train = [r for r in records if r['kind'] == 'train' and 'tokens' in r]
    steps = [0, *(r['step'] for r in train)]
    seen = [0, *(r['tokens'] for r in train)]
    for record in records:
      if record['kind'] != 'eval' or 'loss' not in record:
        continue
      # Runs that log rarely have evaluations between, or before, all lines.
      if 'tokens' in record or train:
        between = float(np.interp(record['step'], steps, seen))
        points[float(record.get('tokens', between))] = record['loss']
  if result.get('eval_loss') is not None:
    points[float(result['num_tokens'])] = result['eval_loss']
  if not points:
    raise ValueError('has no evaluation: --config.loop.eval_every=N makes them')
  good = sorted((t, v) for t, v in points.items() if t > 0 and math.isfinite(v))
  if not good:
    raise ValueError('has no finite loss after a token')
  tokens, loss = (np.array(x, float) for x in zip(*good, strict=True))
  size = np.full(len(tokens), float(result['num_params']))
  name = np.full(len(tokens), str(path.parent), dtype=object)
  return size, tokens, loss, name
