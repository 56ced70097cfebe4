"""Compute utilisation of schedules that exchange layer by layer.

The model behind Streaming DiLoCo's figures: a step is a graph of nodes, one a
layer: forward, backward to activations, backward to parameters, and, where
the layer's fragment is due, a reduction. Nodes of computing follow each other,
reductions follow each other, and neither waits for more than it needs.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Model:
  """What is trained: parameters are spread evenly over the layers."""

  name: str
  num_params: float
  num_layers: int
  step_secs: float


@dataclasses.dataclass(frozen=True)
class Method:
  """How it is exchanged between two replicas.

  Attributes:
    name: What it is called.
    sync_period: Steps between two reductions of a layer; 1 is data-parallel.
    layers_per_fragment: Layers reduced together, a stride apart; None is all.
    overlap_steps: Whole steps that may pass before the result is needed.
    bits_per_parameter: That cross the link for each parameter.
  """

  name: str
  sync_period: int
  layers_per_fragment: int | None = None
  overlap_steps: int = 0
  bits_per_parameter: float = 16.0


def utilization(
  model: Model,
  method: Method,
  bits_per_sec: np.ndarray,
  *,
  num_periods: int = 4,
) -> np.ndarray:
  """Share of time spent computing, in the steady state.

  With two replicas a ring all-reduce sends each parameter once, so a layer
  takes its bits over the bandwidth. Latency is left out, as it is there.

  Args:
    model: What is trained.
    method: When what is exchanged.
    bits_per_sec: Bandwidths between the replicas.
    num_periods: Sync periods to simulate; the last one is measured.

  Source: Douillard et al. 2025, section 3.1, arXiv:2501.18512.
  """
  num_layers, period = model.num_layers, method.sync_period
  # The first layer needs no gradient of its input.
  node_secs = model.step_secs / (3 * num_layers - 1)
  reduce_secs = (
    model.num_params
    * method.bits_per_parameter
    / num_layers
    / np.asarray(bits_per_sec)
  )
  due_layers = _due_layers(model, method)
  clock, link_free = np.zeros_like(reduce_secs), np.zeros_like(reduce_secs)
  arrivals: dict[tuple[int, int], np.ndarray] = {}
  ends = []
  # Even data-parallel training needs some steps to settle.
  num_steps = max(num_periods * period, 8)
  for step in range(num_steps):
    for layer in range(num_layers):
      arrival = arrivals.pop((step, layer), None)
      if arrival is not None:
        clock = np.maximum(clock, arrival)
      clock = clock + node_secs
    for layer in reversed(range(num_layers)):
      clock = clock + (node_secs if layer == 0 else 2 * node_secs)
      if layer in due_layers[step % period]:
        link_free = np.maximum(link_free, clock) + reduce_secs
        arrivals[step + 1 + method.overlap_steps, layer] = link_free
    ends.append(clock)
  return period * model.step_secs / (ends[-1] - ends[-1 - period])


def _due_layers(model: Model, method: Method) -> list[set[int]]:
  """Layers to reduce at the end of each step of a period."""
  per_fragment = method.layers_per_fragment or model.num_layers
  count = math.ceil(model.num_layers / per_fragment)
  due: list[set[int]] = [set() for _ in range(method.sync_period)]
  for fragment in range(count):
    at = round(fragment * method.sync_period / count) % method.sync_period
    due[at].update(range(fragment, model.num_layers, count))
  return due
