"""READ FIRST. Decodes a batch of prompts, speculating where it pays.

    chooser = strategy.Strategy(strategy_config.CPU)
    engine = Engine(config, drafter=drafting.model_free(), chooser=chooser)
    generation = engine.generate(params, prompts, lengths, sampling, key)

The device runs whole stretches of rounds (`rounds.run`). Between stretches the
host looks at who has ended: it moves the live rows into a smaller batch, lets
waiting prompts join, and asks the strategy how to draft. None of that changes
what is generated: row b says what `models.sampling.generate` says.
"""

from typing import Any

import numpy as np

from efficient_llm.models import sampling as sampling_lib
from efficient_llm.models import transformer
from efficient_llm.speculative import (
  continuation,
  job,
  programs,
  row_queue,
  strategy,
)
from efficient_llm.speculative import generation as generation_lib
from efficient_llm.speculative import state as state_lib
from efficient_llm.typing import Array, Params


class Engine:
  """Holds compiled programs; parameters are passed in at every call."""

  def __init__(
    self,
    config: transformer.TransformerConfig,
    *,
    drafter: state_lib.Drafter | None = None,
    chooser: strategy.Strategy | None = None,
    max_batch: int = 32,
    rounds_at_once: int = 16,
    max_kept_prompts: int = 0,
  ):
    """Prepares an engine.

    Args:
      config: A causal model.
      drafter: From `drafting`; None decodes plainly.
      chooser: Which draft shape to use; without one speculation is off.
      max_batch: Rows decoded together; further prompts wait and join.
      rounds_at_once: Rounds that run on the device before the host looks.
      max_kept_prompts: Prompts that are kept, once read, for rows that join
        later; never fewer than the rows that join at once.

    Raises:
      ValueError: If the model is not causal, or a number is below 1.
    """
    for name, value in (
      ('max_batch', max_batch),
      ('rounds_at_once', rounds_at_once),
    ):
      if value < 1:
        raise ValueError(f'engine.{name}={value} must be at least 1.')
    if not config.causal:
      raise ValueError(
        'Only a causal model can complete prompts; set model.causal=True.'
      )
    if drafter is not None and chooser is None:
      raise ValueError('A drafter needs a chooser of draft shapes; give one.')
    if drafter is not None and chooser is not None:
      _check_arms(drafter, chooser)
    self._config = config
    self._drafter = drafter
    self._chooser = chooser
    self._max_batch = max_batch
    self._rounds_at_once = rounds_at_once
    self._max_kept_prompts = max_kept_prompts
    self._programs = programs.Programs()

  def generate(
    self,
    params: Params,
    prompts_NP: Array | np.ndarray,
    prompt_lengths_N: Array | np.ndarray,
    sampling: sampling_lib.SamplingConfig,
    key: Array,
    *,
    draft_params: Any = None,
    groups_N: Array | np.ndarray | None = None,
    refresh: generation_lib.Refresh | None = None,
    finished: generation_lib.Finished | None = None,
    queue: row_queue.RowQueue | None = None,
    begun: continuation.Begun | None = None,
    stop: generation_lib.Stop | None = None,
  ) -> generation_lib.Generation:
    """Completes prompts; row n draws with the coins of row n.

    Args:
      params: The target's.
      prompts_NP: Prompts, padded on the right; every prompt has a token.
      prompt_lengths_N: Real tokens of each.
      sampling: How to draw.
      key: A typed random key, or one for each row.
      draft_params: What the drafter reads.
      groups_N: Prompts of one group may draft from each other's answers; every
        row is a group of its own by default.
      refresh: Asked between stretches for a drafter trained meanwhile.
      finished: Told of every completion between stretches.
      queue: Which rows to complete, shared with other engines that are given
        the same prompts; all by default. One that is closed meanwhile ends
        the call early.
      begun: Completions to go on with, each at least one token short of the
        longest; what is drawn does not depend on where they were left if the
        parameters are the same.
      stop: Asked between stretches; from True on what is unfinished is left.

    Raises:
      ValueError: If the prompts are empty or do not fit the model.
    """
    sampling.validate()
    num_rows, num_prompt = prompts_NP.shape
    lengths_N = np.asarray(prompt_lengths_N)
    self._check(num_rows, num_prompt, lengths_N, sampling)
    if groups_N is not None:
      groups_N = np.asarray(groups_N, np.int32)
    task = job.Job(
      programs=self._programs,
      plan=self._plan(num_prompt, sampling),
      chooser=self._chooser if self._drafter is not None else None,
      max_batch=self._max_batch,
      max_kept_prompts=self._max_kept_prompts,
      rounds_at_once=self._rounds_at_once,
      params=params,
      draft_params=draft_params,
      prompts_NP=np.asarray(prompts_NP, np.int32),
      lengths_N=lengths_N.astype(np.int32),
      keys_N=key if key.ndim else sampling_lib.row_keys(key, num_rows),
      groups_N=groups_N,
      refresh=refresh,
      finished=finished,
      stop=stop,
      begun=begun
      or continuation.Begun.nothing(num_rows, sampling.max_new_tokens),
      waiting=row_queue.RowQueue(range(num_rows)) if queue is None else queue,
    )
    return task.run()

  def _check(
    self,
    num_rows: int,
    num_prompt: int,
    lengths_N: np.ndarray,
    sampling: sampling_lib.SamplingConfig,
  ) -> None:
    if not num_rows:
      raise ValueError('There must be at least one prompt.')
    if lengths_N.min() < 1 or lengths_N.max() > num_prompt:
      raise ValueError(
        f'Every prompt must have 1 to {num_prompt} tokens, got '
        f'{lengths_N.min()} to {lengths_N.max()}.'
      )
    total = int(lengths_N.max()) + sampling.max_new_tokens
    if total > self._config.max_positions:
      raise ValueError(
        f'{lengths_N.max()} prompt tokens and sampling.max_new_tokens='
        f'{sampling.max_new_tokens} exceed model.max_positions='
        f'{self._config.max_positions}; shorten one of them.'
      )

  def _plan(
    self, num_prompt: int, sampling: sampling_lib.SamplingConfig
  ) -> state_lib.Plan:
    room = 1
    if self._chooser is not None and self._drafter is not None:
      room = max(shape.num_nodes for shape in self._chooser.arms())
    capacity = num_prompt + sampling.max_new_tokens + room
    return state_lib.Plan(
      self._config, sampling, self._drafter, -(-capacity // 64) * 64
    )


def _check_arms(drafter: state_lib.Drafter, chooser: strategy.Strategy) -> None:
  for shape in chooser.arms():
    if shape.copied and not drafter.copies:
      raise ValueError(
        f'strategy.arms {shape.name} copies, which this drafter cannot; leave '
        "out the 'c', or take model_free or union."
      )
    if shape.sampled and not drafter.samples:
      raise ValueError(
        f'strategy.arms {shape.name} is drawn at random, which this drafter '
        "cannot; leave out the 's', or take one with a draft model."
      )
