"""Picks the growth method by short trials of several, whose cost is counted.

The loss right after growth ranks methods badly: those that begin best often end
last. So each candidate is grown and trained for some steps, and the lowest
validation loss wins. Its trial is the beginning of the run, so only the others'
steps are spent on choosing. It has the run's warm-up and then the peak rate; a
trial that ends in warm-up has seen little of it.
Source: Pan et al. 2024, LAG, arXiv:2406.02469.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from efficient_llm.ligo import card
from efficient_llm.ligo.config import LigoConfig
from efficient_llm.models.config import TransformerConfig
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import metrics, processes, strict_json

_FOLDER = 'probes'
_LEARNED = '+learn'
# What a trial leaves that a run goes on from; the card stands before the
# checkpoints, which a folder may not have without it.
_PARTS = (
  'small.json',
  'operator',
  card.FILE_NAME,
  metrics.FILE_NAME,
  'tensorboard',
  'checkpoints',
)


def candidates(
  small: TransformerConfig, large: TransformerConfig
) -> tuple[str, ...]:
  """Methods worth a trial, by what grows, the likeliest first.

  By `benchmarks.ligo_savings`: in depth alone, layers repeated or added at
  rest; with width, new places at rest, or holding the mean of the others.
  """
  if large.embed_dim == small.embed_dim:
    return ('stack', 'identity')
  return ('stack', 'lemon')


def choose(
  config: LigoConfig,
  run: Callable[[LigoConfig, pathlib.Path], loop_lib.Outcome],
  *,
  small: TransformerConfig,
  workdir: pathlib.Path,
) -> tuple[LigoConfig, list[dict[str, Any]]] | loop_lib.Outcome:
  """The configuration with the best method, and what the trials were.

  Args:
    config: With method='auto'.
    run: Grows and trains as a configuration says, in a folder.
    small: The small model.
    workdir: Of the run; trials have folders of their own in it.
  Returns:
    The outcome of a trial that was stopped, in place of both. Otherwise the
    best trial's checkpoints are the run's.
  """
  folder = workdir / _FOLDER
  chosen = folder / 'chosen.json'
  found = processes.on_first(
    lambda: json.loads(chosen.read_bytes()) if chosen.is_file() else None
  )
  if found is not None:
    _adopt(folder / found['name'], workdir)
    return _candidate(config, found['name']), found['probes']
  probes: list[dict[str, Any]] = []
  for name, candidate in trials(config, small).items():
    trial = _trial(candidate, config.probe.num_steps, workdir=workdir)
    outcome = run(trial, folder / name)
    if outcome.stopped_by is not None:
      return outcome
    growth = json.loads((folder / name / card.FILE_NAME).read_bytes())
    probes.append(
      {
        'name': name,
        'chosen': False,
        'loss': outcome.eval_metrics['loss'],
        'tokens': outcome.num_tokens + growth['operator_tokens'],
        'secs': outcome.train_secs + growth['operator_secs'],
      }
    )
  # Anything is better than a loss that is not a number.
  best = min(
    probes,
    key=lambda x: x['loss'] if math.isfinite(x['loss']) else math.inf,
  )
  best['chosen'] = True
  if jax.process_index() == 0:
    text = strict_json.to_json(
      {'name': best['name'], 'probes': probes}, indent=2
    )
    strict_json.write_atomically(chosen, text)
  _adopt(folder / best['name'], workdir)
  return _candidate(config, best['name']), probes


def trials(
  config: LigoConfig, small: TransformerConfig
) -> dict[str, LigoConfig]:
  """What is tried, by name.

  Args:
    config: With method='auto'.
    small: The small model.
  """
  names = config.probe.candidates or candidates(small, config.model)
  return {name: _candidate(config, name) for name in names}


def _adopt(trial: pathlib.Path, workdir: pathlib.Path) -> None:
  """Makes a trial the beginning of the run; may be stopped and done again."""

  def move() -> None:
    for name in _PARTS:
      if (trial / name).exists() and not (workdir / name).exists():
        (trial / name).rename(workdir / name)

  processes.on_first(move)


def _candidate(config: LigoConfig, name: str) -> LigoConfig:
  learn = config.learn
  if not name.endswith(_LEARNED):
    learn = dataclasses.replace(learn, num_steps=0)
  return dataclasses.replace(
    config, method=name.removesuffix(_LEARNED), learn=learn
  )


def _trial(
  config: LigoConfig, num_steps: int, *, workdir: pathlib.Path
) -> LigoConfig:
  """As the run begins, and no further."""
  return config.aside(
    workdir,
    optimizer=dataclasses.replace(
      config.optimizer,
      schedule='constant',
    ),
    loop=dataclasses.replace(
      config.loop, num_steps=num_steps, eval_every=None, profile_steps=None
    ),
  )
