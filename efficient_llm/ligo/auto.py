"""Picks the growth method by short trials of several, whose cost is counted.

The loss right after growth ranks methods badly: those that begin best often end
last. So each candidate is grown and trained for some steps, and the lowest
validation loss wins.
Source: Pan et al. 2024, LAG, arXiv:2406.02469.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from efficient_llm.ligo import card
from efficient_llm.ligo.config import LigoConfig
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import strict_json

_FOLDER = 'probes'
_LEARNED = '+learn'


def choose(
  config: LigoConfig,
  run: Callable[[LigoConfig, pathlib.Path], loop_lib.Outcome],
  *,
  workdir: pathlib.Path,
) -> tuple[LigoConfig, list[dict[str, Any]]] | loop_lib.Outcome:
  """The configuration with the best method, and what the trials were.

  Args:
    config: With method='auto'.
    run: Grows and trains as a configuration says, in a folder.
    workdir: Of the run; trials have folders of their own in it.
  Returns:
    The outcome of a trial that was stopped, in place of both.
  """
  folder = workdir / _FOLDER
  chosen = folder / 'chosen.json'
  if chosen.is_file():
    found = json.loads(chosen.read_bytes())
    return _candidate(config, found['name']), found['probes']
  probes: list[dict[str, Any]] = []
  for name in config.probe.candidates:
    trial = _trial(_candidate(config, name), config.probe.num_steps)
    outcome = run(trial, folder / name)
    if outcome.stopped_by is not None:
      return outcome
    growth = json.loads((folder / name / card.FILE_NAME).read_bytes())
    probes.append(
      {
        'name': name,
        'loss': outcome.eval_metrics['loss'],
        'tokens': outcome.num_tokens + growth['operator_tokens'],
        'secs': outcome.train_secs + growth['operator_secs'],
      }
    )
  best = min(probes, key=lambda probe: probe['loss'])['name']
  text = strict_json.to_json({'name': best, 'probes': probes}, indent=2)
  strict_json.write_atomically(chosen, text)
  return _candidate(config, best), probes


def _candidate(config: LigoConfig, name: str) -> LigoConfig:
  learn = config.learn
  if not name.endswith(_LEARNED):
    learn = dataclasses.replace(learn, num_steps=0)
  return dataclasses.replace(
    config, method=name.removesuffix(_LEARNED), learn=learn
  )


def _trial(config: LigoConfig, num_steps: int) -> LigoConfig:
  """As the run begins, and no further."""
  return dataclasses.replace(
    config,
    scratch='',
    sample_prompts=(),
    optimizer=dataclasses.replace(
      config.optimizer,
      schedule='constant',
      warmup_steps=min(config.optimizer.warmup_steps, num_steps // 2),
    ),
    loop=dataclasses.replace(
      config.loop, num_steps=num_steps, eval_every=None, profile_steps=None
    ),
  )
