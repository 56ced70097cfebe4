"""What to predict, from which rows."""

import dataclasses
from typing import Literal

from efficient_llm import typing as types
from efficient_llm.scaling import data as data_lib
from efficient_llm.scaling import sweep as sweep_lib


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """What may be spent, and how well is to be predicted.

  Attributes:
    budget_flops: For all small runs together.
    accuracy: Error of the prediction that is good enough, in percent.
    noise: Standard deviation of log loss between equal runs; None measures it
      on the data where runs were repeated, and takes 0.3 % where not.
    borrow: Whether other families' constants count.
  """

  budget_flops: float = 1e19
  accuracy: float = 2.0
  noise: float | None = None
  borrow: bool = True


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
  """A prediction.

  Attributes:
    mode: 'predict', or 'plan' for advice before anything is trained.
    data: CSV, JSON lines or Parquet.
    runs: Pattern of result.json files of this project; instead of `data`.
    rows: How rows are read.
    target_params: Model to predict; None takes ten times the largest.
    target_tokens: Of that model; None gives it as many a parameter as the
      largest model has had.
    sweep: The guide's procedure, for the heat map.
    num_bootstraps: Resampled fits for the picture of exponents.
    plan: Of mode 'plan'.
    seed: Of resampling.
  """

  mode: Literal['predict', 'plan'] = 'predict'
  data: str = ''
  runs: str = ''
  rows: data_lib.DataConfig = dataclasses.field(
    default_factory=data_lib.DataConfig
  )
  target_params: float | None = None
  target_tokens: float | None = None
  sweep: sweep_lib.SweepConfig = dataclasses.field(
    default_factory=sweep_lib.SweepConfig
  )
  num_bootstraps: int = 256
  plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
  seed: int = 0

  def validate(self) -> None:
    types.check_choices(self, name='scaling')
    self.rows.validate()
    self.sweep.validate()
    if self.data and self.runs:
      raise ValueError(
        f'data={self.data!r} and runs={self.runs!r} are two sources; set one.'
      )
    for name in ('target_params', 'target_tokens'):
      value = getattr(self, name)
      if value is not None and value <= 0:
        raise ValueError(f'{name}={value} must be above 0; change it.')
    if self.num_bootstraps < 2:
      raise ValueError(
        f'num_bootstraps={self.num_bootstraps} must be at least 2.'
      )
    if (
      self.mode == 'plan'
      and self.target_params is None
      and not (self.data or self.runs)
    ):
      raise ValueError(
        'A plan without data needs --config.target_params=N, the model to '
        'predict.'
      )
