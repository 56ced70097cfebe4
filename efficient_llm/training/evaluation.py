"""Validation of a model."""

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm import typing
from efficient_llm.data import dataset as dataset_lib
from efficient_llm.training import step


def of_state(
  dataset: dataset_lib.Dataset | None, **settings: Any
) -> Callable[[Any], dict[str, float]] | None:
  """What a loop evaluates a state with; None without a validation split.

  Args:
    dataset: The validation split.
    **settings: Of `evaluate`.
  """
  if dataset is None:
    return None
  return lambda state: evaluate(dataset, state.params, **settings)


def evaluate(
  dataset: dataset_lib.Dataset,
  params: typing.Params,
  *,
  eval_step: step.EvalStep,
  place: Callable[[typing.Batch], typing.Batch],
  num_batches: int | None,
  process: tuple[int, int] = (0, 1),
) -> dict[str, float]:
  """Mean loss in nats per target and accuracy.

  And of text the perplexity and, where tokens are predicted one after another,
  the bits per byte.

  Args:
    dataset: The validation split.
    params: The model's.
    eval_step: (params, batch) -> Loss.
    place: Puts a batch on the devices.
    num_batches: The first so many; None for all.
    process: This process's share of the rows, see `Dataset.iterate`.

  Raises:
    ValueError: If the split has no batch.
  """
  total = None
  batches = dataset.iterate(process=process, repeat=False)
  with contextlib.closing(batches):
    for batch in itertools.islice(batches, num_batches):
      loss = eval_step(params, place(batch))
      total = loss if total is None else jax.tree.map(jnp.add, total, loss)
  if total is None:
    raise ValueError('The validation split has no batch; add data to it.')
  total = jax.device_get(total)
  weight = max(float(total.weight), 1e-9)
  nats = float(total.metrics['nats']) / weight
  found = dataset.statistics()
  values = {
    'loss': nats,
    'accuracy': float(total.metrics['accuracy']) / weight,
  }
  if dataset.config.objective != 'classes':
    values['perplexity'] = math.exp(min(nats, 700.0))
  if dataset.config.objective == 'causal':
    # A document's first token is given, all others predict its bytes.
    predicted = found['tokens'] - found['documents']
    values['bits_per_byte'] = nats / math.log(2) * predicted / found['bytes']
  return values
