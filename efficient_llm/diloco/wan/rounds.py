"""When a round closes: quorum, grace and deadline."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from efficient_llm.diloco.wan.config import RoundConfig


@dataclasses.dataclass(frozen=True)
class Closing:
  """Why a round closes.

  Attributes:
    reason: 'all', 'grace' or 'deadline'.
    missing: Islands that were waited for in vain.
  """

  reason: str
  missing: tuple[str, ...] = ()


def closing(
  config: RoundConfig,
  *,
  arrived: Mapping[str, float],
  present: Iterable[str],
  now: float,
) -> Closing | None:
  """Whether a round closes now.

  Args:
    config: The rule.
    arrived: When each island's update came, in seconds.
    present: Islands that are waited for.
    now: The time, on the same clock.
  """
  if not arrived:
    return None
  waited_for = set(present)
  missing = tuple(sorted(waited_for - set(arrived)))
  if not missing:
    return Closing('all')
  quorum = max(1, math.ceil(config.quorum * len(waited_for | set(arrived))))
  times = sorted(arrived.values())
  if len(times) >= quorum and now >= times[quorum - 1] + config.grace_secs:
    return Closing('grace', missing)
  if now >= times[0] + config.deadline_secs:
    return Closing('deadline', missing)
  return None
