"""The same answers with and without TLT, in turn: what it saves."""

import dataclasses
import pathlib
import statistics
from typing import Any

import jax
import numpy as np
from absl import logging

from efficient_llm.tlt import start as start_lib
from efficient_llm.tlt import trainer as trainer_lib
from efficient_llm.tlt.config import TltConfig
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import report


def compare(
  config: TltConfig, *, workdir: str | pathlib.Path, num_steps: int
) -> dict[str, Any] | loop_lib.Outcome:
  """Answers the problems of some steps both ways and writes ab/result.json.

  Both ways have the model that the run begins with, the same problems and the
  same coins; neither updates it. The first step compiles and is not counted.

  Args:
    config: The run.
    workdir: Gets the stages that are missing, and the result.
    num_steps: Counted steps, at least 1.
  Returns:
    The result, or how a stage ended that a signal interrupted.
  Raises:
    ValueError: If the configuration will not do.
  """
  config.validate()
  if num_steps < 1:
    raise ValueError(f'{num_steps=} must be at least 1.')
  if config.rollout.speculation == 'off':
    raise ValueError(
      "rollout.speculation='off' leaves nothing to compare; choose 'union'."
    )
  workdir = pathlib.Path(workdir).absolute()
  start = start_lib.prepare(config, workdir)
  if isinstance(start, loop_lib.Outcome):
    return start
  plain = dataclasses.replace(
    config, rollout=dataclasses.replace(config.rollout, speculation='off')
  )
  secs: dict[str, list[float]] = {'plain': [], 'tlt': []}
  accepted, same = [], []
  num_prompts = config.rollout.num_prompts
  with (
    trainer_lib.Trainer(plain, start) as without,
    trainer_lib.Trainer(config, start) as with_tlt,
  ):
    states = {'plain': without.init_state(), 'tlt': with_tlt.init_state()}
    arms = {'plain': without, 'tlt': with_tlt}
    for step in range(num_steps + 1):
      numbers = np.arange(num_prompts) + step * num_prompts
      outcomes, prompts = {}, with_tlt.problems.training(numbers)
      for name in ('plain', 'tlt') if step % 2 else ('tlt', 'plain'):
        outcomes[name] = arms[name].answer(states[name], prompts, step)
        if step:
          secs[name].append(outcomes[name].secs)
      same.append(
        float((outcomes['plain'].tokens_NT == outcomes['tlt'].tokens_NT).mean())
      )
      accepted.append(outcomes['tlt'].acceptance_length)
      logging.info(
        'step %d: plain %.2f s, with TLT %.2f s, %.2f tokens a pass, %.1f %% '
        'of tokens the same',
        step,
        outcomes['plain'].secs,
        outcomes['tlt'].secs,
        accepted[-1],
        100 * same[-1],
      )
  ratios = np.divide(secs['plain'], secs['tlt']).tolist()
  result = {
    'speedup_rollout': statistics.median(ratios),
    'speedup_by_step': ratios,
    'plain_secs': secs['plain'],
    'tlt_secs': secs['tlt'],
    'acceptance_length': statistics.mean(accepted[1:]),
    'share_of_same_tokens': statistics.mean(same),
    'config': dataclasses.asdict(config),
  }
  if jax.process_index() == 0:
    report.write_result(workdir / 'ab', result)
  return result
