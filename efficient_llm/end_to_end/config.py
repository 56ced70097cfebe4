"""All there is to the line: one target, and how each technique makes it."""

import dataclasses
import pathlib
from typing import Any

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding
from efficient_llm.diloco.compression import CompressionConfig
from efficient_llm.diloco.config import DilocoConfig
from efficient_llm.diloco.fragments import FragmentConfig
from efficient_llm.diloco.outer import OuterConfig
from efficient_llm.ligo.config import LearnConfig, LigoConfig, ProbeConfig
from efficient_llm.tlt.config import TltConfig
from efficient_llm.training.config import PretrainConfig

# Stands for folders that are known once the stage before has run.
_LATER = 'later'


@dataclasses.dataclass(frozen=True)
class Rung:
  """A model of the ladder; what is None is as in the target."""

  num_steps: int | None = None
  num_layers: int | None = None
  embed_dim: int | None = None
  num_heads: int | None = None
  num_kv_heads: int | None = None
  mlp_dim: int | None = None


@dataclasses.dataclass(frozen=True)
class GrowthConfig:
  """How the best rung becomes the target; see `LigoConfig`.

  Attributes:
    num_steps: Of the grown model's training.
    optimizer: Of that; the target's where None.
  """

  num_steps: int = 200
  method: str = 'stack'
  probe: ProbeConfig = ProbeConfig()
  learn: LearnConfig = LearnConfig()
  optimizer: optimizer_lib.OptimizerConfig | None = None


@dataclasses.dataclass(frozen=True)
class IslandsConfig:
  """How the grown model trains on; see `DilocoConfig`.

  Attributes:
    num_steps: Of every island, and of data-parallel training beside them.
    islands: Each has its share of the target's batch.
    optimizer: Inner one of the islands; the target's where None.
    control_optimizer: Of data-parallel training; as the islands' where None.
  """

  num_steps: int = 150
  islands: int = 4
  sync_period: int = 25
  optimizer: optimizer_lib.OptimizerConfig | None = None
  control_optimizer: optimizer_lib.OptimizerConfig | None = None
  outer: OuterConfig = OuterConfig()
  fragments: FragmentConfig = FragmentConfig()
  compression: CompressionConfig = CompressionConfig()
  mesh: sharding.MeshConfig = sharding.MeshConfig(island=-1, fsdp=1)


@dataclasses.dataclass(frozen=True)
class EndToEndConfig:
  """The line.

  Attributes:
    target: The model, its text and its training from nothing, which the
      prediction is of and growth is compared with.
    ladder: Smaller models to predict from, the best of which is grown.
    growth: How.
    islands: How the grown model trains on.
    reasoning: Supervised stage, drafter and reinforcement learning; the model
      is that of the islands.
  """

  target: PretrainConfig = PretrainConfig()
  ladder: tuple[Rung, ...] = ()
  growth: GrowthConfig = GrowthConfig()
  islands: IslandsConfig = IslandsConfig()
  reasoning: TltConfig = TltConfig()

  def validate(self) -> None:
    """Checks every stage before the first one runs."""
    if len(self.ladder) < 2:
      raise ValueError(
        f'ladder has {len(self.ladder)} rungs and must have two or more; add '
        'smaller models.'
      )
    if self.target.data.batch_size % self.islands.islands:
      raise ValueError(
        f'target.data.batch_size={self.target.data.batch_size} must be '
        f'divisible by islands.islands={self.islands.islands}; change one.'
      )
    for name in ('start', 'checkpoint', 'first_drafter'):
      holder = self.target if name == 'start' else self.reasoning
      if getattr(holder, name):
        raise ValueError(
          f'{name}={getattr(holder, name)!r} is what the stage before made; '
          'leave it out.'
        )
    later = pathlib.Path(_LATER)
    for part in (
      self.target,
      *self.rungs(later),
      self.grown(later, small=later, scratch=later),
      self.distributed(later, start=later),
      self.control(later, start=later),
      self.reasoned(start=later),
    ):
      part.validate()
    for rung in self.rungs(later):
      if rung.model.sizes == self.target.model.sizes:
        raise ValueError(
          f'ladder: {rung.model.sizes} must be smaller than the target; change '
          'it.'
        )

  def rungs(self, workdir: pathlib.Path) -> list[PretrainConfig]:
    """The ladder's runs."""
    found = []
    for rung in self.ladder:
      changes = {
        name: value
        for name, value in dataclasses.asdict(rung).items()
        if value is not None
      }
      num_steps = changes.pop('num_steps', self.target.loop.num_steps)
      model = dataclasses.replace(self.target.model, **changes)
      if 'num_layers' in changes:
        # A scan that was unrolled whole stays so.
        unroll = min(model.scan_unroll, model.num_layers)
        model = dataclasses.replace(model, scan_unroll=unroll)
      found.append(
        dataclasses.replace(
          self._like_target(workdir, num_steps), model=model, sample_prompts=()
        )
      )
    return found

  def scratch(self, workdir: pathlib.Path) -> PretrainConfig:
    """The target, from nothing."""
    return self._like_target(workdir, self.target.loop.num_steps)

  def grown(
    self, workdir: pathlib.Path, *, small: pathlib.Path, scratch: pathlib.Path
  ) -> LigoConfig:
    """The target, from the best rung."""
    growth = self.growth
    return LigoConfig(
      **self._fields(workdir, growth.num_steps, growth.optimizer),
      small=str(small),
      scratch=str(scratch),
      method=growth.method,
      probe=growth.probe,
      learn=growth.learn,
    )

  def distributed(
    self, workdir: pathlib.Path, *, start: pathlib.Path
  ) -> DilocoConfig:
    """The grown model on islands."""
    islands = self.islands
    fields = self._fields(workdir, islands.num_steps, islands.optimizer)
    data = self.target.data
    share = data.batch_size // islands.islands
    fields |= {
      'start': str(start),
      'mesh': islands.mesh,
      'data': dataclasses.replace(fields['data'], batch_size=share),
      # As many sequences as the others are evaluated on.
      'loop': dataclasses.replace(
        fields['loop'],
        eval_batches=self.target.loop.eval_batches
        and self.target.loop.eval_batches * islands.islands,
      ),
    }
    return DilocoConfig(
      **fields,
      islands=islands.islands,
      sync_period=islands.sync_period,
      outer=islands.outer,
      fragments=islands.fragments,
      compression=islands.compression,
    )

  def control(
    self, workdir: pathlib.Path, *, start: pathlib.Path
  ) -> PretrainConfig:
    """The grown model with data-parallel training, over as many tokens."""
    islands = self.islands
    optimizer = islands.control_optimizer or islands.optimizer
    fields = self._fields(workdir, islands.num_steps, optimizer)
    fields['start'] = str(start)
    return PretrainConfig(**fields)

  def reasoned(self, *, start: pathlib.Path) -> TltConfig:
    """The islands' model, which learns to answer."""
    supervised = dataclasses.replace(
      self.reasoning.supervised, model=self.target.model, start=str(start)
    )
    return dataclasses.replace(self.reasoning, supervised=supervised)

  def _like_target(
    self, workdir: pathlib.Path, num_steps: int
  ) -> PretrainConfig:
    return PretrainConfig(**self._fields(workdir, num_steps, None))

  def _fields(
    self,
    workdir: pathlib.Path,
    num_steps: int,
    optimizer: optimizer_lib.OptimizerConfig | None,
  ) -> dict[str, Any]:
    """What all stages on the target's text have in common."""
    target = self.target
    cache_dir = target.data.cache_dir or str(workdir / 'cache')
    fields: dict[str, Any] = {
      field.name: getattr(target, field.name)
      for field in dataclasses.fields(PretrainConfig)
    }
    return fields | {
      'data': dataclasses.replace(target.data, cache_dir=cache_dir),
      'loop': dataclasses.replace(target.loop, num_steps=num_steps),
      'optimizer': optimizer or target.optimizer,
    }
