"""Learning curves of this project's own runs, as rows for the laws."""

import glob
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from efficient_llm.scaling import data
from efficient_llm.training import metrics


def read(pattern: str) -> data.Runs:
  """Learning curves of the runs that a pattern names.

  Args:
    pattern: Of result.json files, such as 'out/*/result.json'. What follows no
      law of training from nothing (drafters, grown models, reports that are not
      of training) is left out, as `Runs.bad_rows` says.
  Returns:
    One row for every evaluation in metrics.jsonl beside each, the last from
    result.json where there is no such file. Sizes are all parameters, tables
    of embeddings included; tokens are the targets trained on, repeats
    included; losses are those of the evaluation, in nats per token. Runs on
    one text are a family.
  Raises:
    ValueError: If none is found, none is of a training run, or some count in
      other units.
  """
  paths = sorted(pathlib.Path(p) for p in glob.glob(pattern))
  if not paths:
    raise ValueError(f'runs={pattern} names no file; check the pattern.')
  results = {p: json.loads(p.read_text(encoding='utf-8')) for p in paths}
  left_out = {p: _why_not(result) for p, result in results.items()}
  bad = [data.BadRow(str(p), why) for p, why in left_out.items() if why]
  if len(bad) == len(paths):
    raise ValueError(
      f'runs={pattern} names no training run: {bad[0].line} {bad[0].reason}; '
      'name those of experiments.pretrain.'
    )
  results = {p: r for p, r in results.items() if not left_out[p]}
  units = {str(one.get('unit', 'tokens')) for one in results.values()}
  if len(units) > 1:
    raise ValueError(
      f'runs={pattern} must have one unit, not {", ".join(sorted(units))}; '
      'name the runs of one kind.'
    )
  parts = [_curve(path, result) for path, result in results.items()]
  sizes, tokens, loss, names, texts = (
    np.concatenate(column) for column in zip(*parts, strict=True)
  )
  return data.make(
    sizes, tokens, loss, run=names, family=texts, bad_rows=tuple(bad)
  )


def _why_not(result: Mapping[str, Any]) -> str | None:
  """Why the laws do not speak of it; None where they do."""
  for name in ('num_params', 'num_tokens'):
    if name not in result:
      return f'is not of a training run: it lacks {name}'
  if 'eval_acceptance_1' in result:
    return 'is of a drafter'
  if 'growth' in result:
    return 'did not begin from nothing: its model was grown'
  if result.get('config', {}).get('start'):
    return 'did not begin from nothing: it has a start'
  return None


def _text(result: Mapping[str, Any]) -> str:
  """What a run was trained on."""
  config = result.get('config', {}).get('data')
  if not config:
    return 'family'
  sources = config.get('sources') or [config['path']]
  tokenizer = config.get('tokenizer', 'bytes')
  parts = [*sources, *([] if tokenizer == 'bytes' else [tokenizer])]
  return ' '.join(parts)


def _curve(
  path: pathlib.Path, result: Mapping[str, Any]
) -> tuple[np.ndarray, ...]:
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
  if 'eval_loss' in result:
    points[float(result['num_tokens'])] = result['eval_loss']
  if not points:
    raise ValueError(
      f'{path} has no evaluation; train with --config.loop.eval_every=N.'
    )
  good = sorted((t, v) for t, v in points.items() if t > 0 and math.isfinite(v))
  if not good:
    raise ValueError(f'{path} has no finite loss after a token; leave it out.')
  tokens, loss = (np.array(x, float) for x in zip(*good, strict=True))
  size = np.full(len(tokens), float(result['num_params']))
  name = np.full(len(tokens), str(path.parent), dtype=object)
  return size, tokens, loss, name, np.full(len(tokens), _text(result), object)
