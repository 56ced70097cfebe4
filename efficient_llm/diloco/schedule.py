"""What happens when: a pure function of the configuration and the step.

So nothing of it is in a checkpoint, and a resumed run does the same.
"""

import dataclasses
from typing import Literal

import numpy as np

from efficient_llm.diloco import fragments
from efficient_llm.diloco.config import DilocoConfig

# Speeds such as 1/3 must not lose a step to rounding.
_SLACK = 1e-9


@dataclasses.dataclass(frozen=True)
class Event:
  """Something between two inner steps.

  Attributes:
    kind: 'send' merges updates and steps the shared parameters, 'apply' hands
      them to the islands, 'join' gives all of them to islands that come back.
    fragment: Of the model.
    reached: Islands it happens to.
    partners: For 'noloco', who is averaged with whom.
  """

  kind: Literal['send', 'apply', 'join']
  fragment: int = 0
  reached: tuple[bool, ...] = ()
  partners: tuple[int, ...] = ()


class Schedule:
  """When islands train, send and apply.

  Args:
    config: The run.
  """

  def __init__(self, config: DilocoConfig):
    self._config = config
    self._absences = config.membership.parsed_absences()
    speeds = np.asarray(config.membership.speeds or (1.0,) * config.islands)
    self._speeds = speeds / speeds.max()

  @property
  def may_rest(self) -> bool:
    """Whether there are steps in which an island does not train."""
    return bool(self._absences) or bool((self._speeds < 1).any())

  def trains(self, step: int) -> np.ndarray:
    """Which islands make an inner step in this one, counted from 1."""
    moves = self._moves(step) > self._moves(step - 1)
    return moves & self.is_here(step)

  def is_here(self, step: int) -> np.ndarray:
    """Which islands are not away in this step."""
    here = np.ones(self._config.islands, bool)
    for absence in self._absences:
      here[absence.island] &= not absence.first <= step <= absence.last
    return here

  def events(self, step: int) -> list[Event]:
    """What happens after this inner step, in order.

    The last step of a run sends everything, so that no training is lost.
    """
    if self._config.method == 'delayed':
      found = self._arrivals(step)
    else:
      found = self._syncs(step)
    if self._config.method != 'diloco':
      # A round of these ends with every island's new parameters.
      found = [event for event in found if event.kind == 'send']
    is_last = step == self._config.loop.num_steps
    if self._config.membership.rejoin == 'adopt' and not is_last:
      back = self.is_here(step + 1) & ~self.is_here(step)
      if back.any():
        found.append(Event('join', reached=tuple(back.tolist())))
    return found

  def _syncs(self, step: int) -> list[Event]:
    config = self._config
    parts = config.fragments
    is_last = step == config.loop.num_steps
    found = []
    for fragment in range(parts.count):
      age = self._age(step, fragment)
      is_applied = age == parts.overlap_steps
      if is_last and age != 0:
        # What is under way is applied first.
        if age is not None and age <= parts.overlap_steps:
          found.append(Event('apply', fragment))
        found.append(self._send(step, fragment))
        found.append(Event('apply', fragment))
        continue
      if age == 0:
        found.append(self._send(step, fragment))
        is_applied |= is_last
      if is_applied:
        found.append(Event('apply', fragment))
    return found

  def _age(self, step: int, fragment: int) -> int | None:
    """Steps since a fragment was last sent; None before the first time."""
    period = self._config.sync_period
    since = step - fragments.offset(
      fragment, count=self._config.fragments.count, sync_period=period
    )
    # The first fragment has nothing to send at step 0.
    first = 0 if fragment else period
    return since % period if since >= first else None

  def _send(self, step: int, fragment: int) -> Event:
    config = self._config
    here = self.is_here(step)
    chance = config.membership.drop_probability
    if chance:
      here &= self._random(step, fragment).random(config.islands) >= chance
    partners = ()
    if config.method == 'noloco':
      partners = self._pairs(step, here)
    return Event('send', fragment, tuple(here.tolist()), partners)

  def _pairs(self, step: int, here: np.ndarray) -> tuple[int, ...]:
    """Random pairs of those who are here; who is left over stays alone."""
    partners = np.arange(self._config.islands)
    order = self._random(step, -1).permutation(np.flatnonzero(here))
    for one, other in zip(order[::2], order[1::2], strict=False):
      partners[one], partners[other] = other, one
    return tuple(partners.tolist())

  def _arrivals(self, step: int) -> list[Event]:
    """Islands that have just made all steps of a round of their own."""
    config = self._config
    periods = np.full(config.islands, config.sync_period)
    if not config.membership.equal_steps:
      periods = np.maximum(
        np.floor(self._speeds * config.sync_period + _SLACK), 1
      ).astype(int)
    made = self._moves(step)
    arrived = self.trains(step) & (made % periods == 0)
    if step == config.loop.num_steps:
      arrived = self.is_here(step)
    if not arrived.any():
      return []
    return [Event('send', reached=tuple(arrived.tolist()))]

  def _moves(self, step: int) -> np.ndarray:
    """Inner steps that each island's speed allows up to here."""
    return np.floor(step * self._speeds + _SLACK).astype(int)

  def _random(self, step: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([self._config.seed, step, purpose + 2])
