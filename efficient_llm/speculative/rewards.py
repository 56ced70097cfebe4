"""What a bandit remembers of its arms, and how much exploring may cost."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

# So many of an arm's newest rewards count at any age: one may be luck.
_FEWEST = 3


class Reward(NamedTuple):
  """What one stretch of rounds told of an arm.

  Attributes:
    index: Number of the stretch among those of all arms.
    accepted_length: Tokens per round and live row.
    rounds_per_sec: The other factor: the product is tokens per second and row.
  """

  index: int
  accepted_length: float
  rounds_per_sec: float


@dataclasses.dataclass
class _Arm:
  rewards: collections.deque[Reward]
  rest_secs: float = 0.0

  def recent(self, since: int) -> list[Reward]:
    return [reward for reward in self.rewards if reward.index > since]

  def estimate(self, since: int) -> float:
    """Tokens per second and row."""
    recent = self.recent(since)
    if len(recent) < _FEWEST:
      recent = list(self.rewards)[-_FEWEST:]
    # Accepted lengths really differ between rounds, so they are averaged. What
    # disturbs the clock is a fault, which the median leaves out.
    length = statistics.fmean(reward.accepted_length for reward in recent)
    return length * statistics.median(r.rounds_per_sec for r in recent)


class Arms:
  """The arms of one bucket, by name.

  An arm that was not the best lost c = secs * (1 - reward / best reward)
  seconds when it was tried. It then rests until the other arms have run for
  c * (n - 1) / exploration seconds, n the number of arms. So of T seconds

      lost_secs(T) <= exploration * T + sum over arms of c_max,

  c_max an arm's dearest single try, wherever the estimates rank the arms
  rightly; `max_rest_secs` only matters to tries that lose more than
  exploration * max_rest_secs / (n - 1) seconds.

  When speeds change, an arm that is now the best is found again after about

      window + (n - 1) * (c / s / exploration + 3 / epsilon)

  stretches: old rewards are forgotten, its rest ends (c of its last try, s
  seconds a stretch), and it is tried up to three times.
  """

  def __init__(
    self,
    names: tuple[str, ...],
    *,
    window: int,
    exploration: float,
    max_rest_secs: float,
  ):
    """Starts without rewards.

    Args:
      names: Of the arms.
      window: Rewards older than so many stretches are forgotten.
      exploration: Share of the time that trying other arms may lose.
      max_rest_secs: Longest rest.
    """
    self._arms = {n: _Arm(collections.deque(maxlen=window)) for n in names}
    self._window = window
    self._share = exploration / max(1, len(names) - 1)
    self._max_rest_secs = max_rest_secs
    self._left_out: frozenset[str] = frozenset()
    self.num_stretches = 0

  def leave_out(self, names: frozenset[str]) -> None:
    """From now on these are neither tried nor what others are held against."""
    if names != self._left_out:
      self._left_out = names
      for arm in self._arms.values():
        arm.rest_secs = 0.0

  def unseen(self) -> str | None:
    """The first arm without a reward."""
    unseen = (name for name, arm in self._available() if not arm.rewards)
    return next(unseen, None)

  def estimates(self) -> dict[str, float]:
    """Tokens per second and row of each arm that has been tried."""
    since = self.num_stretches - self._window
    return {
      name: arm.estimate(since)
      for name, arm in self._available()
      if arm.rewards
    }

  def upper_bounds(self, width: float) -> dict[str, float]:
    """Upper confidence bounds of the rewards, as shares of the best.

    Args:
      width: Weight of what is not known; 1 in UCB1.
    """
    estimates = self.estimates()
    best = max(*estimates.values(), 1e-9)
    log = math.log(min(self.num_stretches, self._window))
    since = self.num_stretches - self._window
    bounds = {}
    for name, estimate in estimates.items():
      num_tries = len(self._arms[name].recent(since))
      unknown = math.sqrt(2 * log / num_tries) if num_tries else math.inf
      bounds[name] = estimate / best + width * unknown
    return bounds

  def is_rested(self, name: str) -> bool:
    return self._arms[name].rest_secs <= 0

  def learn(
    self, name: str, accepted_length: float, rounds_per_sec: float, secs: float
  ) -> None:
    """Notes a stretch, and what it lost against the best arm.

    Args:
      name: The arm.
      accepted_length: Tokens per round and live row.
      rounds_per_sec: Rounds per second.
      secs: Time of the stretch.
    """
    self.num_stretches += 1
    played = self._arms[name]
    reward = Reward(self.num_stretches, accepted_length, rounds_per_sec)
    played.rewards.append(reward)
    for arm in self._arms.values():
      arm.rest_secs = max(0.0, arm.rest_secs - secs)
    played.rest_secs = 0.0
    if name in self._left_out:
      return
    estimates = self.estimates()
    best = max(estimates.values())
    if estimates[name] < best:
      own = accepted_length * rounds_per_sec
      lost_secs = secs * max(0.0, 1 - own / best)
      rest_secs = lost_secs / self._share
      played.rest_secs = min(rest_secs, self._max_rest_secs)

  def to_dict(self) -> dict[str, Any]:
    """Everything learnt, as plain values for JSON."""
    return {
      'num_stretches': self.num_stretches,
      'arms': {
        name: {
          'rest_secs': arm.rest_secs,
          'rewards': [list(reward) for reward in arm.rewards],
        }
        for name, arm in self._arms.items()
      },
    }

  def restore(self, saved: Mapping[str, Any]) -> None:
    """Goes on from what `to_dict` gave.

    Raises:
      AttributeError, KeyError, TypeError, ValueError: If it is of other arms
        or damaged.
    """
    num_stretches = saved['num_stretches']
    arms = {
      name: (arm['rest_secs'], [Reward(*reward) for reward in arm['rewards']])
      for name, arm in saved['arms'].items()
    }
    if set(arms) != set(self._arms):
      raise ValueError(f'arms must be {sorted(self._arms)}, are {sorted(arms)}')
    numbers = [num_stretches]
    for rest_secs, rewards in arms.values():
      numbers += [rest_secs, *(number for r in rewards for number in r)]
    for number in numbers:
      if not 0 <= number < math.inf:
        raise ValueError(f'every number must be 0 or more, one is {number}')
    self.num_stretches = num_stretches
    for name, (rest_secs, rewards) in arms.items():
      self._arms[name].rest_secs = rest_secs
      self._arms[name].rewards.extend(rewards)

  def _available(self) -> list[tuple[str, _Arm]]:
    return [x for x in self._arms.items() if x[0] not in self._left_out]
