"""Advantages of answers within their group, and which groups teach anything.

Everything here is numpy on the host. N counts answers, G groups: the answers to
one prompt.
"""

import dataclasses
from typing import Literal

import numpy as np

Algorithm = Literal['grpo', 'dr_grpo', 'dapo', 'gspo']


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
  """How rewards become advantages.

  Attributes:
    scale: 'std' divides by the standard deviation of the group, 'none' leaves
      the difference to the mean; None is the algorithm's: 'none' for Dr. GRPO,
      'std' for the others.
    epsilon: Added to the standard deviation.
    overlong_buffer_tokens: Over so many tokens before the longest completion
      the reward sinks by 1 (`soft_overlong_punishment`); None is off.
  """

  scale: Literal['std', 'none'] | None = None
  epsilon: float = 1e-6
  overlong_buffer_tokens: int | None = None

  def validate(self) -> None:
    """Checks ranges; raises ValueError with one line."""
    if self.scale not in ('std', 'none', None):
      raise ValueError(
        f'advantages.scale={self.scale!r} must be one of std, none, None.'
      )
    if not 0 <= self.epsilon < float('inf'):
      raise ValueError(f'advantages.epsilon={self.epsilon} must be 0 or more.')
    buffer = self.overlong_buffer_tokens
    if buffer is not None and buffer < 1:
      raise ValueError(
        f'advantages.overlong_buffer_tokens={buffer} must be at least 1; None '
        'is off.'
      )


def advantages(
  rewards_N: np.ndarray,
  groups_N: np.ndarray,
  *,
  algorithm: Algorithm = 'grpo',
  config: AdvantageConfig = AdvantageConfig(),
  lengths_N: np.ndarray | None = None,
  max_completion_tokens: int | None = None,
) -> np.ndarray:
  """How much better each answer is than its group, float64.

      A = (r - mean(r)) / (std(r) + epsilon)    'grpo', 'dapo', 'gspo'
      A = r - mean(r)                           'dr_grpo'

  A group whose rewards are all equal gets exactly 0. The standard deviation is
  that of the group itself (divided by its size, not by one less).

  Args:
    rewards_N: Finite; groups with a failed reward are to be left out before.
    groups_N: A number for each answer, the same within a group.
    algorithm: Whose formula.
    config: Its details, and the punishment of long answers.
    lengths_N: Tokens of each completion; only for the punishment.
    max_completion_tokens: Longest completion; only for the punishment.
  Raises:
    ValueError: If a reward is not finite, or the punishment lacks its inputs.
  Source: Shao et al. 2024, DeepSeekMath, section 4.1.2, arXiv:2402.03300; Liu
    et al. 2025, Dr. GRPO, section 3.2, arXiv:2503.20783; Yu et al. 2025, DAPO,
    equation 9, arXiv:2503.14476; Zheng et al. 2025, GSPO, equation 6,
    arXiv:2507.18071.
  """
  rewards_N = np.asarray(rewards_N, np.float64)
  if not np.isfinite(rewards_N).all():
    row = int(np.flatnonzero(~np.isfinite(rewards_N))[0])
    raise ValueError(
      f'Rewards must be finite, that of answer {row} is {rewards_N[row]}; '
      'leave its group out.'
    )
  buffer_tokens = config.overlong_buffer_tokens
  if buffer_tokens is not None:
    if lengths_N is None or max_completion_tokens is None:
      raise ValueError(
        f'advantages.overlong_buffer_tokens={buffer_tokens} needs lengths_N '
        'and max_completion_tokens; pass both.'
      )
    rewards_N = rewards_N + soft_overlong_punishment(
      lengths_N,
      buffer_tokens=buffer_tokens,
      max_completion_tokens=max_completion_tokens,
    )
  _, group_N, size_G = np.unique(
    groups_N, return_inverse=True, return_counts=True
  )
  mean_G = np.bincount(group_N, rewards_N) / size_G
  difference_N = rewards_N - mean_G[group_N]
  # The mean of equal numbers may miss them by a rounding.
  difference_N = np.where(informative(rewards_N, groups_N), difference_N, 0.0)
  scale = config.scale or ('none' if algorithm == 'dr_grpo' else 'std')
  if scale == 'none':
    return difference_N
  std_G = np.sqrt(np.bincount(group_N, difference_N**2) / size_G)
  # Without epsilon a group of equal rewards would give 0 / 0.
  divisor_N = np.where(difference_N == 0, 1.0, std_G[group_N] + config.epsilon)
  return difference_N / divisor_N


def informative(rewards_N: np.ndarray, groups_N: np.ndarray) -> np.ndarray:
  """Which answers belong to a group whose rewards are not all equal.

  The others have advantage 0 and would only be trained on in vain. A group with
  a NaN among its rewards is not informative either.

  Args:
    rewards_N: As the verifier gave them, without punishments.
    groups_N: A number for each answer, the same within a group.
  Source: dynamic sampling of Yu et al. 2025, DAPO, section 3.2,
    arXiv:2503.14476. `collection` answers others in their place.
  """
  rewards_N = np.asarray(rewards_N, np.float64)
  _, first_G, group_N = np.unique(
    groups_N, return_index=True, return_inverse=True
  )
  differs_N = rewards_N != rewards_N[first_G][group_N]
  num_different_G = np.bincount(group_N, differs_N)
  num_failed_G = np.bincount(group_N, np.isnan(rewards_N))
  return ((num_different_G > 0) & (num_failed_G == 0))[group_N]


def soft_overlong_punishment(
  lengths_N: np.ndarray, *, buffer_tokens: int, max_completion_tokens: int
) -> np.ndarray:
  """What is added to the reward of a long answer: from 0 down to -1.

  0 up to `max_completion_tokens - buffer_tokens`, then falling by 1 over the
  buffer. An answer that was cut off at the limit gets -1.

  Args:
    lengths_N: Tokens of each completion.
    buffer_tokens: Over how many tokens it falls.
    max_completion_tokens: Longest completion, the buffer included.
  Raises:
    ValueError: If the buffer is longer than the longest completion.
  Source: Yu et al. 2025, DAPO, equation 13, arXiv:2503.14476.
  """
  if not 1 <= buffer_tokens <= max_completion_tokens:
    raise ValueError(
      f'advantages.overlong_buffer_tokens={buffer_tokens} must be between 1 '
      f'and {max_completion_tokens=}; lower it.'
    )
  free_tokens = max_completion_tokens - buffer_tokens
  over_N = np.asarray(lengths_N, np.float64) - free_tokens
  return -np.clip(over_N / buffer_tokens, 0.0, 1.0)
