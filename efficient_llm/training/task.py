"""What the training loop is given by a technique, and what it gives back."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from efficient_llm import typing


class BatchSource(Protocol):
  """An iterator of batches that knows where it stands."""

  def __next__(self) -> Mapping[str, Any]: ...

  def get_state(self) -> dict[str, Any]:
    """Where it stands, as JSON can hold it."""
    ...

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes back there."""
    ...


@dataclasses.dataclass(frozen=True)
class Task:
  """What is trained: the parts that techniques supply.

  Attributes:
    title: Short name shown beside the progress.
    step: (state, batch) -> (state, metrics); metrics hold scalars, among them
      'loss', 'tokens' and 'finite'; others need not come with every step.
    batches: Where batches come from.
    place: Puts a batch on the devices.
    evaluate: Gives validation metrics of a state, or None.
    metadata: What a checkpoint says about itself (configuration, model).
    unit: What a token is called on the progress line.
    flops_per_token: For the model FLOPs utilisation; None leaves it out.
    read: Makes such metrics, on the host, of what a step gave, where that is
      something else.
  """

  title: str
  step: Callable[[Any, Any], tuple[Any, typing.Metrics]]
  batches: BatchSource
  place: Callable[[Any], Any]
  evaluate: Callable[[Any], Mapping[str, float]] | None = None
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  unit: str = 'tokens'
  flops_per_token: float | None = None
  read: Callable[[Any], Mapping[str, Any]] = lambda values: values


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Attributes:
    state: The last state.
    stopped_by: Name of the signal that ended it early, or None.
    num_tokens: Target tokens trained on, resumed parts included; batches that
      were skipped do not count.
    train_secs: Seconds spent in steps, without compilation, evaluation and
      checkpoints, resumed parts included.
    eval_metrics: The last evaluation.
  """

  state: Any
  stopped_by: str | None
  num_tokens: float
  train_secs: float
  eval_metrics: Mapping[str, float]
