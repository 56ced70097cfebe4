"""How the drafter is kept up to date, and the rules for it."""

import dataclasses
from typing import Literal

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import typing
from efficient_llm.speculative import drafter_loss

Mode = Literal['adaptive', 'frozen', 'separate']


@dataclasses.dataclass(frozen=True)
class SpotConfig:
  """How the drafter is kept up to date.

  Attributes:
    mode: 'adaptive' trains in idle time; 'frozen' never; 'separate' in a stage
      of its own after the rollouts, which the step waits for.
    batch_size: Rows of a batch, into which answers are packed.
    publish_every: Training steps between two drafters that workers take up.
    separate_steps: Training steps of the stage of its own.
    max_steps: Of training in one step of the run; more idle time is left idle.
    max_staleness: Steps of the run without training. Until then none is begun
      that by experience the rollouts would have to wait for.
    max_texts: Answers of a step that are kept.
  """

  mode: Mode = 'adaptive'
  batch_size: int = 2
  publish_every: int = 4
  separate_steps: int = 4
  max_steps: int = 64
  max_staleness: int = 8
  max_texts: int = 512
  loss: drafter_loss.DrafterLossConfig = drafter_loss.DrafterLossConfig()
  optimizer: optimizer_lib.OptimizerConfig = optimizer_lib.OptimizerConfig(
    learning_rate=1e-3, schedule='constant', warmup_steps=0
  )

  def validate(self) -> None:
    """Checks ranges; raises ValueError with one line."""
    typing.check_choices(self, name='drafter')
    for name in (
      'batch_size',
      'publish_every',
      'separate_steps',
      'max_steps',
      'max_staleness',
      'max_texts',
    ):
      if getattr(self, name) < 1:
        raise ValueError(
          f'drafter.{name}={getattr(self, name)} must be at least 1; raise it.'
        )
    self.loss.validate()
    self.optimizer.validate()
