"""How a growth operator begins and is learned, and the run around it.

Over 300 lines: every setting of a growth, with its rules.
"""

import dataclasses
import pathlib
from typing import Any, Literal

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import typing
from efficient_llm.models.config import TransformerConfig
from efficient_llm.training.config import PretrainConfig


@dataclasses.dataclass(frozen=True)
class MethodConfig:
  """How the operator begins.

  Attributes:
    depth: Which small layer a layer of the large model comes from: 'stack' the
      whole model again, 'interpolate' each layer several times, 'top' the upper
      layers again, 'overlap' all but the last ones and all but the first ones;
      'identity' as 'interpolate', where all but the first of equal layers add
      nothing to the residual stream; 'append' the small model and then random
      layers.
    width: What new width starts as: 'zero' nothing is read of it, 'copy' it
      repeats the small model's, 'average' new places of the residual stream
      hold the mean of all, 'mix' every new row is a random mean of rows,
      'fresh' random weights all over.
    copies: Of which units 'copy' makes copies: 'cyclic' all in turn, 'random'
      ones drawn by chance.
    split: What reads copies shares their weight among them, so that their sum
      stays; otherwise it reads all in full.
    fresh: With 'zero' and 'average', what may be anything without changing the
      function starts at random, not at zero.
    noise: Of what reads copies, in units of a fresh start's standard deviation;
      it sums to zero over the copies of a unit.
    advanced: New columns come from the layer above (AKI).
    depth_noise: Layers that a layer does not come from get random weights up to
      this before all are scaled to sum to 1.
    kept: Whether anything of the small model is; otherwise all is random.
  """

  depth: Literal[
    'stack', 'interpolate', 'top', 'overlap', 'identity', 'append'
  ] = 'stack'
  width: Literal['zero', 'copy', 'average', 'mix', 'fresh'] = 'zero'
  copies: Literal['cyclic', 'random'] = 'cyclic'
  split: bool = True
  fresh: bool = True
  noise: float = 0.0
  advanced: bool = False
  depth_noise: float = 0.0
  kept: bool = True

  def validate(self) -> None:
    """Checks ranges; raises ValueError with one line."""
    typing.check_choices(self, name='method')
    for name in ('noise', 'depth_noise'):
      if not 0 <= getattr(self, name) < float('inf'):
        raise ValueError(
          f'method.{name}={getattr(self, name)} must be 0 or more; raise it.'
        )
    if self.width != 'copy' and (self.noise or self.advanced):
      raise ValueError(
        f"method.noise and method.advanced need method.width='copy', is "
        f'{self.width!r}; change one of them.'
      )


@dataclasses.dataclass(frozen=True)
class LearnConfig:
  """How the operator is learned, on the large model's loss.

  Attributes:
    num_steps: Updates of the operator; 0 leaves it as it begins.
    batch_size: Sequences of a batch; as in training where None.
    tie: What reads an axis and norms follow what writes it, as in the paper; or
      all have matrices of their own ('free'), without which Net2Net is none of
      the operators; or every large layer has its own besides ('layer').
    optimizer: Of the operator, whose matrices do not decay.
  """

  num_steps: int = 0
  batch_size: int | None = None
  tie: Literal['paper', 'free', 'layer'] = 'free'
  optimizer: optimizer_lib.OptimizerConfig = optimizer_lib.OptimizerConfig(
    learning_rate=3e-3, schedule='wsd', warmup_steps=0, weight_decay=0.0
  )

  def validate(self) -> None:
    """Checks ranges; raises ValueError with one line."""
    typing.check_choices(self, name='learn')
    if self.num_steps < 0:
      raise ValueError(
        f'learn.num_steps={self.num_steps} must be 0 or more; raise it.'
      )
    if self.batch_size is not None and self.batch_size < 1:
      raise ValueError(
        f'learn.batch_size={self.batch_size} must be at least 1; raise it.'
      )
    self.optimizer.validate()
    if self.num_steps:
      optimizer_lib.make_schedule(
        self.optimizer, num_steps=self.num_steps, name='learn.optimizer'
      )


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """The trials from which method='auto' chooses.

  Attributes:
    candidates: Methods; '+learn' behind one learns its operator. Where empty,
      two that suit what grows; see `auto.candidates`.
    num_steps: Of training in each. The best one's are the run's first.
  """

  candidates: tuple[str, ...] = ()
  num_steps: int = 40

  def check(self, *, learn: LearnConfig, num_steps: int) -> None:
    """Raises ValueError if a setting breaks a rule, in one line."""
    if not 1 <= self.num_steps < num_steps:
      raise ValueError(
        f'probe.num_steps={self.num_steps} must be at least 1 and below '
        f'loop.num_steps={num_steps}.'
      )
    if len(set(self.candidates)) < len(self.candidates):
      raise ValueError(
        f'probe.candidates={self.candidates} must differ; leave one out.'
      )
    if not learn.num_steps and any('+' in name for name in self.candidates):
      raise ValueError(
        f'probe.candidates={self.candidates} learn an operator, for which '
        'learn.num_steps must be at least 1; set it, or leave +learn out.'
      )


@dataclasses.dataclass(frozen=True)
class InheritConfig:
  """How the small model teaches the large one; see `inheritance`.

  Attributes:
    weight: The teacher's share of the loss at the first step; 0 for no teacher.
    share_of_steps: Within which that falls to 0, along a line.
    temperature: Of both models in the divergence.
  """

  weight: float = 0.0
  share_of_steps: float = 0.44
  temperature: float = 2.0

  def validate(self) -> None:
    """Checks ranges; raises ValueError with one line."""
    if not 0 <= self.weight <= 1:
      raise ValueError(
        f'inherit.weight={self.weight} must be in [0, 1]; change it.'
      )
    if not 0 < self.share_of_steps <= 1:
      raise ValueError(
        f'inherit.share_of_steps={self.share_of_steps} must be in (0, 1]; '
        'change it.'
      )
    if not 0 < self.temperature < float('inf'):
      raise ValueError(
        f'inherit.temperature={self.temperature} must be positive; raise it.'
      )


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """A model on the way from the small to the large one.

  Attributes:
    num_steps: Of its training.
    num_layers: As in the large model where None; the other sizes too.
    method: How it grows out of the model before it; the run's where None.
    rest_old: Whether only new layers are trained; see `LigoConfig`.
    sub_model_layers: Top layers of a sub-model; see `LigoConfig`.
  """

  num_steps: int
  num_layers: int | None = None
  embed_dim: int | None = None
  num_heads: int | None = None
  num_kv_heads: int | None = None
  mlp_dim: int | None = None
  method: str | None = None
  rest_old: bool = False
  sub_model_layers: int | None = None

  def validate(self) -> None:
    """Checks ranges; raises ValueError with one line."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if type(value) is int and value < 1:
        raise ValueError(f'stages: {field.name}={value} must be at least 1.')

  def model(self, large: TransformerConfig) -> TransformerConfig:
    """The stage's model."""
    sizes = {
      name: getattr(self, name)
      for name in _STAGE_SIZES
      if getattr(self, name) is not None
    }
    return dataclasses.replace(large, **sizes)


_STAGE_SIZES = (
  'num_layers',
  'embed_dim',
  'num_heads',
  'num_kv_heads',
  'mlp_dim',
)


@dataclasses.dataclass(frozen=True)
class LigoConfig(PretrainConfig):
  """A pre-training run whose model grows out of a smaller one.

  Attributes:
    small: Folder of the small model's run.
    small_step: Checkpoint of it; where None the newest at the first call.
    method: Name in `methods.METHODS`: how the operator begins; or 'auto', the
      best of some trials.
    probe: The trials of 'auto'.
    learn: How it is learned; with learn.num_steps=0 the method is all.
    moments: Whether the optimiser's moments grow too.
    rest_old: Whether only the layers that growth added are trained, and
      nothing outside the layers (LLaMA-Pro with method='identity').
    sub_model_layers: Every step trains a sub-model drawn by chance: the lowest
      so many layers or a multiple of them, of which only as many at its top
      are updated, with the head (bert2BERT's first stage). None trains all.
    inherit: Whether the small model also teaches the large one.
    stages: Models on the way, each trained as long as it says, with a schedule
      of its own: MSLT with method='top' and rest_old, progressive training.
    scratch: Folder of a run of the large model from nothing, which the report
      compares with; empty for none.
  """

  small: str = ''
  small_step: int | None = None
  method: str = 'stack'
  probe: ProbeConfig = ProbeConfig()
  learn: LearnConfig = LearnConfig()
  moments: bool = False
  rest_old: bool = False
  sub_model_layers: int | None = None
  inherit: InheritConfig = InheritConfig()
  stages: tuple[StageConfig, ...] = ()
  scratch: str = ''

  def validate(self) -> None:
    """Checks every part and the rules across them, before any compilation."""
    if not self.small:
      raise ValueError(
        "small must name the folder of the small model's run; set "
        '--config.small=out/pretrain.'
      )
    if self.start:
      raise ValueError(
        f'start={self.start!r} must be empty, as growth begins with '
        f'small={self.small!r}; leave it out.'
      )
    if self.method == 'auto':
      self.probe.check(learn=self.learn, num_steps=self.loop.num_steps)
      if not self.data.validation_fraction and not self.data.validation_path:
        raise ValueError(
          "method='auto' compares validation losses; set "
          'data.validation_fraction or data.validation_path.'
        )
    for stage in self.stages:
      stage.validate()
    self._check_steps()
    super().validate()

  @property
  def flops_per_token(self) -> float:
    """As of pre-training; with sub-models their mean, without the teacher's."""
    top = self.sub_model_layers
    if top is None:
      return super().flops_per_token
    found = [
      dataclasses.replace(
        self,
        model=dataclasses.replace(self.model, num_layers=length),
        sub_model_layers=None,
        resting_layers=tuple(range(length - top)),
      )
      for length in self.sub_model_lengths
    ]
    return sum(one.flops_per_token for one in found) / len(found)

  @property
  def sub_model_lengths(self) -> range:
    """Layers of the sub-models."""
    top = self.sub_model_layers or self.model.num_layers
    return range(top, self.model.num_layers + 1, top)

  def _check_steps(self) -> None:
    """Refuses steps that are none of those there are, or two at once."""
    top = self.sub_model_layers
    if top is not None and (top < 1 or self.model.num_layers % top):
      raise ValueError(
        f'sub_model_layers={top} must divide the {self.model.num_layers} '
        'layers of the model; change it.'
      )
    chosen = {
      'sub_model_layers': top is not None,
      'inherit.weight': self.inherit.weight > 0,
      'rest_old': self.rest_old,
      "method='auto'": self.method == 'auto',
    }
    names = [name for name, is_set in chosen.items() if is_set]
    if len(names) > 1 and names != ['rest_old', "method='auto'"]:
      raise ValueError(
        f'{names[0]} does not go together with {names[1]}; leave one out.'
      )

  def aside(self, workdir: pathlib.Path, **changes: Any) -> 'LigoConfig':
    """A run in a folder of this one's, with the same text.

    Args:
      workdir: Of this run, where the tokens are kept for both.
      **changes: Fields that differ.
    """
    cache_dir = self.data.cache_dir or str(workdir.absolute() / 'cache')
    settings = {
      'scratch': '',
      'sample_prompts': (),
      'data': dataclasses.replace(self.data, cache_dir=cache_dir),
    }
    return dataclasses.replace(self, **(settings | changes))
