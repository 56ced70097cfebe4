"""What growing saves: the same loss for fewer FLOPs, honestly counted.

A saving is 1 - cost / cost of training from nothing to the same loss (a speedup
of 2 is a saving of one half). Warm counts the operator and the large model's
steps; cold counts the small model's training too. The operator's steps count as
the large model's; the map itself, a percent or less at usual batches, does not.
Where growing does not reach scratch's last loss, both are taken at the loss
that it does reach.
Source: Wang et al. 2023, LiGO, table 1, counts warm; the cold column is ours.
"""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Curve:
  """Validation losses on the way.

  Attributes:
    costs: Of the large model's training so far, ascending (FLOPs, seconds).
    losses: In nats a token.
  """

  costs: Sequence[float]
  losses: Sequence[float]

  def __post_init__(self) -> None:
    if len(self.costs) != len(self.losses) or not self.costs:
      raise ValueError(
        f'A curve must have as many costs as losses and one at least, has '
        f'{len(self.costs)} and {len(self.losses)}.'
      )
    if any(a >= b for a, b in zip(self.costs, self.costs[1:], strict=False)):
      raise ValueError('The costs of a curve must ascend.')

  def cost_of(self, loss: float) -> float | None:
    """Where the loss is first reached, linear in between; None if nowhere."""
    for i, value in enumerate(self.losses):
      if value > loss:
        continue
      if i == 0:
        return self.costs[0]
      before = self.losses[i - 1]
      share = (before - loss) / (before - value)
      return self.costs[i - 1] + share * (self.costs[i] - self.costs[i - 1])
    return None


@dataclasses.dataclass(frozen=True)
class Saving:
  """What growing costs against training from nothing, to one loss.

  Attributes:
    loss: At which they are compared.
    grown: Cost of the operator and the large model's steps.
    scratch: Cost from nothing.
    small: Cost of the small model; None where it is unknown.
    reached: Whether that is scratch's last loss.
  """

  loss: float
  grown: float
  scratch: float
  small: float | None
  reached: bool

  @property
  def warm(self) -> float:
    return 1 - self.grown / self.scratch

  @property
  def cold(self) -> float | None:
    if self.small is None:
      return None
    return 1 - (self.grown + self.small) / self.scratch

  @property
  def break_even(self) -> float | None:
    """Large models that one small model must serve to be worth training."""
    if self.small is None:
      return None
    gained = self.scratch - self.grown
    return self.small / gained if gained > 0 else math.inf


def saving(
  grown: Curve, scratch: Curve, *, operator: float, small: float | None
) -> Saving | None:
  """Compares two runs of the large model.

  Args:
    grown: Of the run that began with growth; its first point may be growth.
    scratch: Of the run that began with nothing.
    operator: Cost of learning the operator.
    small: Cost of the small model.
  Returns:
    None where scratch never had a loss that growing reached.
  """
  wanted = scratch.losses[-1]
  cost = grown.cost_of(wanted)
  if cost is not None:
    found = cost + operator, scratch.cost_of(wanted)
    loss, reached = wanted, True
  else:
    loss, reached = min(grown.losses), False
    if loss > scratch.losses[0]:
      # What it cost scratch to come so far was not seen.
      return None
    found = (grown.cost_of(loss) or 0.0) + operator, scratch.cost_of(loss)
  if found[1] is None or not found[1]:
    return None
  return Saving(loss, found[0], found[1], small, reached)
