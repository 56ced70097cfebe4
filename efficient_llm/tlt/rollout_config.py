"""What is answered in a step of reinforcement learning, and how."""

import dataclasses
import math
from typing import Literal

from efficient_llm import typing
from efficient_llm.models import sampling as sampling_lib
from efficient_llm.speculative import strategy_config

Speculation = Literal['off', 'ngram', 'learned', 'union']


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """What is answered in a step, and how.

  Attributes:
    num_prompts: Problems of a step.
    group_size: Answers to each.
    max_rounds: Rounds of further problems that a step may answer until
      `num_prompts` groups are informative (dynamic sampling of DAPO); 1 is off.
    finish_share: Share of the problems in flight whose answers are complete
      when a step ends. Below 1 more than `num_prompts` problems are in flight.
    unfinished: What becomes of the others: they 'continue' in the next step,
      with tokens of several policies (partial rollouts), or 'wait' until there
      are `num_prompts`, which a step then answers anew and to the end, with
      tokens of one policy (tail batching).
    max_live: Answers that a worker decodes together; further ones wait.
    rounds_at_once: Rounds on the device before the host looks.
    max_kept_prompts: Prompts whose keys and values a worker keeps for the
      answers it begins later; bounds what they take to so many prompts.
    speculation: 'off'; 'ngram' copies from the prompt and from finished answers
      of the group (TLT-Base); 'learned' is the draft model; 'union' both.
    num_texts: Finished answers that are kept to copy from.
    sampling: How answers are drawn; stop tokens are the tokenizer's.
    strategy: Which draft shapes, by live answers of a worker.
  """

  num_prompts: int = 8
  group_size: int = 8
  max_rounds: int = 1
  finish_share: float = 1.0
  unfinished: Literal['continue', 'wait'] = 'continue'
  max_live: int = 8
  rounds_at_once: int = 16
  max_kept_prompts: int = 64
  speculation: Speculation = 'union'
  num_texts: int = 16
  sampling: sampling_lib.SamplingConfig = sampling_lib.SamplingConfig()
  strategy: strategy_config.StrategyConfig = strategy_config.CPU_COPYING

  def validate(self) -> None:
    """Checks ranges; raises ValueError with one line."""
    typing.check_choices(self, name='rollout')
    for name in (
      'num_prompts',
      'max_rounds',
      'max_live',
      'rounds_at_once',
      'max_kept_prompts',
      'num_texts',
    ):
      if getattr(self, name) < 1:
        raise ValueError(
          f'rollout.{name}={getattr(self, name)} must be at least 1; raise it.'
        )
    if self.group_size < 2:
      raise ValueError(
        f'rollout.group_size={self.group_size} must be at least 2, as an '
        'advantage is the distance to the mean of the group; raise it.'
      )
    if not self.sampling.temperature:
      raise ValueError(
        'rollout.sampling.temperature=0 gives a group of equal answers; raise '
        'it, to 1 for example.'
      )
    if not 0 < self.finish_share <= 1:
      raise ValueError(
        f'rollout.finish_share={self.finish_share} must be above 0 and at most '
        '1; 1 waits for all answers.'
      )
    if self.unfinished == 'wait' and (
      not self.is_partial or self.max_rounds > 1
    ):
      raise ValueError(
        f"rollout.unfinished='wait' needs rollout.finish_share below 1, is "
        f'{self.finish_share}, and rollout.max_rounds=1, is {self.max_rounds}: '
        'further rounds would answer in the same step what waits.'
      )
    sampling = self.sampling
    truncates = sampling.top_k or (sampling.top_p or 1) < 1
    if self.is_partial and self.unfinished == 'continue' and truncates:
      raise ValueError(
        f'rollout.finish_share={self.finish_share} weighs tokens by the law '
        'they were drawn from, which sampling.top_k and sampling.top_p change; '
        'leave them None.'
      )
    sampling.validate()
    self.strategy.validate()
    shapes = [
      shape
      for entry in self.strategy.arms
      for shape in strategy_config.parse_shapes(entry)
    ]
    # Found here and not when answering begins, after the stages before it.
    for speculation, kind, mark in (
      ('learned', 'copied', 'c'),
      ('ngram', 'sampled', 's'),
    ):
      if self.speculation == speculation and any(
        getattr(shape, kind) for shape in shapes
      ):
        raise ValueError(
          f'rollout.speculation={speculation!r} drafts nothing {kind}, and '
          f'rollout.strategy.arms={self.strategy.arms} do; leave out what ends '
          f"in {mark!r}, or set rollout.speculation='union'."
        )

  @property
  def is_partial(self) -> bool:
    """Whether a step may end before all its answers."""
    return self.finish_share < 1

  def num_in_flight(self, num_wanted: int) -> int:
    """Problems that are answered at once until so many are complete."""
    # Rounded, as 3 / 0.1 may be a little over 30.
    return math.ceil(round(num_wanted / self.finish_share, 6))
