"""All there is to a run of islands, and the rules across its parts."""

import dataclasses
from typing import Literal

from efficient_llm import sharding, typing
from efficient_llm.diloco import compression as compression_lib
from efficient_llm.diloco import fragments as fragments_lib
from efficient_llm.diloco import outer as outer_lib
from efficient_llm.diloco import screening as screening_lib
from efficient_llm.training import pretrain

Method = Literal['diloco', 'eager', 'delayed', 'noloco']


@dataclasses.dataclass(frozen=True)
class Absence:
  """Inner steps in which an island is away, both ends included."""

  island: int
  first: int
  last: int


@dataclasses.dataclass(frozen=True)
class MembershipConfig:
  """Who takes part, and how fast.

  Attributes:
    drop_probability: Chance that an island misses a sync; it goes on from its
      own parameters.
    absences: 'ISLAND:FIRST:LAST' for inner steps, counted from 1, in which an
      island neither trains nor sends.
    rejoin: An island that comes back takes the shared parameters, or keeps its
      own until the next sync. Either way its inner moments stay its own.
    speeds: Of the islands, relative to each other; empty for equal ones. A
      slower island makes fewer steps.
    equal_steps: With 'delayed', every island sends after sync_period steps of
      its own; otherwise after fewer, so that all send about at once (DyLU).
  """

  drop_probability: float = 0.0
  absences: tuple[str, ...] = ()
  rejoin: Literal['adopt', 'keep'] = 'adopt'
  speeds: tuple[float, ...] = ()
  equal_steps: bool = False

  def parsed_absences(self) -> list[Absence]:
    """The absences as numbers.

    Raises:
      ValueError: If one is not of that form.
    """
    found = []
    for text in self.absences:
      parts = text.split(':')
      if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(
          f'membership.absences={text!r} must be ISLAND:FIRST:LAST, such as '
          '2:100:300.'
        )
      found.append(Absence(*map(int, parts)))
    return found

  def check(self, *, num_islands: int) -> None:
    """Raises ValueError if a setting breaks a rule, in one line."""
    typing.check_choices(self, name='membership')
    if not 0 <= self.drop_probability < 1:
      raise ValueError(
        f'membership.drop_probability={self.drop_probability} must be in '
        '[0, 1).'
      )
    for absence in self.parsed_absences():
      if absence.island >= num_islands or not (
        1 <= absence.first <= absence.last
      ):
        raise ValueError(
          f'membership.absences: {absence} must name one of {num_islands} '
          'islands, counted from 0, and steps from 1 on.'
        )
    if self.speeds and len(self.speeds) != num_islands:
      raise ValueError(
        f'membership.speeds={self.speeds} must be one for each of '
        f'{num_islands} islands; leave it empty for equal ones.'
      )
    if not all(0 < speed < float('inf') for speed in self.speeds):
      raise ValueError(f'membership.speeds={self.speeds} must be positive.')


@dataclasses.dataclass(frozen=True)
class DilocoConfig(pretrain.PretrainConfig):
  """A pre-training run on islands; data.batch_size is an island's.

  Attributes:
    islands: How many there are; several may share a device.
    sync_period: Inner steps between two syncs of the same parameters.
    method: 'diloco' with all its settings; 'eager' applies an average a round
      late, an island's own part of it at once; 'delayed' applies updates as
      they arrive; 'noloco' averages pairs, and no parameters are shared.
  """

  mesh: sharding.MeshConfig = sharding.MeshConfig(island=-1, fsdp=1)
  islands: int = 8
  sync_period: int = 500
  method: Method = 'diloco'
  outer: outer_lib.OuterConfig = outer_lib.OuterConfig()
  fragments: fragments_lib.FragmentConfig = fragments_lib.FragmentConfig()
  compression: compression_lib.CompressionConfig = (
    compression_lib.CompressionConfig()
  )
  screening: screening_lib.ScreeningConfig = screening_lib.ScreeningConfig()
  membership: MembershipConfig = MembershipConfig()

  def validate(self) -> None:
    """Checks every part and the rules across them, before any compilation."""
    for name in ('islands', 'sync_period'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    parts = {
      'fragments': {
        'num_layers': self.model.num_layers,
        'sync_period': self.sync_period,
      },
      'screening': {'num_islands': self.islands},
      'membership': {'num_islands': self.islands},
    }
    for name, sizes in parts.items():
      getattr(self, name).check(**sizes)
    self.outer.validate()
    self.compression.validate()
    typing.check_choices(self, name='config')
    self._validate_method()
    super().validate()

  def _validate_method(self) -> None:
    if self.method == 'diloco' and self.outer.optimizer == 'delayed_nesterov':
      raise ValueError(
        "outer.optimizer='delayed_nesterov' needs updates that arrive one by "
        "one; set method='delayed'."
      )
    if self.method != 'diloco' and self.fragments != (
      fragments_lib.FragmentConfig()
    ):
      raise ValueError(
        f"method={self.method!r} sends the model whole; set method='diloco' or "
        'leave fragments as they are.'
      )
    if self.method == 'noloco' and (
      not self.compression.is_exact or self.outer.optimizer != 'nesterov'
    ):
      raise ValueError(
        "method='noloco' has its own momentum step on exact parameters; set "
        "outer.optimizer='nesterov' and compression.format='float32'."
      )
    if self.method != 'diloco' and self.screening.merge != 'mean':
      raise ValueError(
        f"method={self.method!r} merges by itself; set screening.merge='mean'."
      )
