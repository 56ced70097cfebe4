"""Which draft shapes a bandit or a table chooses from, and how."""

import dataclasses
import math
from typing import Literal

from efficient_llm import typing
from efficient_llm.speculative import tree as tree_lib


@dataclasses.dataclass(frozen=True)
class StrategyConfig:
  """What is chosen from, and how.

  The defaults are TLT's for a GPU. Its 8_4_8 is 7_4_8 here: eight nodes hold no
  longer path.

  Attributes:
    name: 'beg_mab' is TLT's bucketed epsilon-greedy bandit, 'ucb' UCB1, 'fixed'
      a table.
    arms: One entry for each threshold: shapes as `DraftShape.name`, joined by
      '+'. Bandits always have 0_1_1, speculation off, beside them; the table
      uses the one shape of the entry.
    thresholds: Live rows from which on an entry of `arms` holds, the first 1.
    window: Rewards older than so many updates of the same entry are forgotten.
    epsilon: How often 'beg_mab' explores where it may.
    exploration: Share of the time that exploring may lose.
    max_rest_secs: No arm rests longer, so that a hiccup does not banish it.
    ucb_width: Weight of the confidence bound of 'ucb'.
    margin: Share by which an arm must promise more than off: its rows end at
      different times, which leaves places empty that no reward sees.
  Source: Hu et al. 2025 (TLT), arXiv:2511.16665, and its released defaults.
  """

  name: Literal['beg_mab', 'ucb', 'fixed'] = 'beg_mab'
  arms: tuple[str, ...] = ('8_4_48', '8_4_32', '8_4_16', '7_4_8', '0_1_1')
  thresholds: tuple[int, ...] = (1, 2, 5, 21, 33)
  window: int = 32
  epsilon: float = 0.1
  exploration: float = 0.01
  max_rest_secs: float = 600.0
  ucb_width: float = 1.0
  margin: float = 0.05

  def validate(self) -> None:
    typing.check_choices(self, name='strategy')
    if len(self.arms) != len(self.thresholds) or not self.arms:
      raise ValueError(
        f'strategy.arms={self.arms} must have one entry for each of '
        f'strategy.thresholds={self.thresholds}.'
      )
    ascending = sorted(set(self.thresholds))
    if list(self.thresholds) != ascending or self.thresholds[0] != 1:
      raise ValueError(
        f'strategy.thresholds={self.thresholds} must ascend from 1.'
      )
    for entry in self.arms:
      shapes = parse_shapes(entry)
      if self.name == 'fixed' and len(shapes) != 1:
        raise ValueError(
          f'strategy.arms entry {entry!r} must be one shape where '
          "strategy.name='fixed'; use 'beg_mab' to choose among several."
        )
    if self.window < 1:
      raise ValueError(f'strategy.window={self.window} must be at least 1.')
    for name in ('epsilon', 'exploration'):
      if not 0 < getattr(self, name) < 1:
        raise ValueError(
          f'strategy.{name}={getattr(self, name)} must be in (0, 1); '
          "strategy.name='fixed' does not explore."
        )
    for name in ('max_rest_secs', 'ucb_width', 'margin'):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(
          f'strategy.{name}={getattr(self, name)} must be 0 or more.'
        )


# For processors: chains, as a verified node costs there (at 5 M parameters a
# pass over 8 tokens takes 2 times that over one for one row, 4 times for eight,
# where a draft model no longer pays), one less than a power of two deep, as
# matrix products fill rows of vectors. One row's text is now easy to draft, now
# hard, so arms are judged by a long past.
CPU = StrategyConfig(
  arms=('3_1_4+7_1_8', '3_1_4', '0_1_1'),
  thresholds=(1, 2, 5),
  window=256,
  exploration=0.02,
)
# For drafters that copy too.
CPU_COPYING = dataclasses.replace(
  CPU,
  arms=('7_1_8', '3_1_4c', '0_1_1'),
  thresholds=(1, 2, 13),
)


def parse_shapes(entry: str) -> tuple[tree_lib.DraftShape, ...]:
  """Reads shapes such as '8_4_48+4_1_5', each once.

  Raises:
    ValueError: If the text is no such list.
  """
  try:
    shapes = map(tree_lib.DraftShape.parse, entry.split('+'))
    return tuple(dict.fromkeys(shapes))
  except ValueError as error:
    raise ValueError(f'strategy.arms entry {entry!r}: {error}') from error
