"""The bandwidths of Streaming DiLoCo's Table 4, and what comes out here."""

import dataclasses
import itertools

import numpy as np

from efficient_llm.diloco import layer_schedule

# Bandwidths the paper tried: its table shows these, rounded twice.
GRID_GBITS = np.logspace(-1, 3, 50)
TARGETS = (0.5, 0.8, 0.9, 0.95, 0.99)
MODELS = (
  layer_schedule.Model('1B', 1e9, 24, 0.1),
  layer_schedule.Model('10B', 1e10, 48, 0.8),
  layer_schedule.Model('100B', 1e11, 108, 4.9),
)
METHODS = (
  layer_schedule.Method('data-parallel', 1),
  layer_schedule.Method('DiLoCo', 100),
  layer_schedule.Method('streaming', 100, 3),
  layer_schedule.Method('streaming, overlapped', 100, 3, 1),
  layer_schedule.Method('streaming, overlapped, FP4', 100, 3, 1, 4.0),
)
# Gbit/s to reach the targets: Table 4 of arXiv:2501.18512.
_TABLE = {
  '1B': (
    (86.8, 152.6, 184.2, 222.3, 569.0),
    (1.4, 6.2, 13.3, 23.3, 86.8),
    (1.4, 5.2, 9.1, 16.0, 28.1),
    (1.4, 4.3, 6.2, 9.1, 11.0),
    (0.4, 0.9, 1.7, 2.0, 3.0),
  ),
  '10B': (
    (104.8, 222.3, 222.3, 268.3, 471.5),
    (1.7, 7.5, 16.0, 33.9, 104.8),
    (1.7, 5.2, 9.1, 13.3, 19.3),
    (1.7, 3.6, 5.2, 6.2, 7.5),
    (0.4, 0.9, 1.4, 1.4, 1.7),
  ),
  '100B': (
    (184.2, 323.8, 390.7, 390.7, 471.5),
    (3.0, 11.0, 23.3, 49.4, 184.2),
    (2.4, 6.2, 9.1, 11.0, 19.3),
    (1.7, 3.6, 4.3, 5.2, 5.2),
    (0.5, 0.9, 1.1, 1.1, 1.4),
  ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One bandwidth of the table.

  Attributes:
    published_gbits: What the paper says.
    gbits: The bandwidth of the grid whose utilisation is nearest here.
    num_off: Places of the grid between them, a fifth each.
    utilization: Simulated at the published bandwidth.
    points_off: By how much utilisation would have to move, in points, for the
      published bandwidth to be the nearest.
  """

  model: str
  method: str
  target: float
  published_gbits: float
  gbits: float
  num_off: int
  utilization: float
  points_off: float


def cells(*, gbit: float = 2**30) -> list[Cell]:
  """The bandwidths that Streaming DiLoCo's Table 4 asks for.

  Nothing is fitted but two conventions that the paper does not state and the
  whole table shares: that a Gbit is 2^30 bits, and that the table gives the
  bandwidth of the grid whose utilisation is nearest the target (with 'at
  least' values such as the 222.3 under both 80 % and 90 % cannot come out).

  Args:
    gbit: Bits of a Gbit.
  """
  found_cells = []
  for model, (i, method) in itertools.product(MODELS, enumerate(METHODS)):
    found = layer_schedule.utilization(model, method, GRID_GBITS * gbit)
    middles = np.concatenate([[0], (found[1:] + found[:-1]) / 2, [1]])
    for target, published in zip(TARGETS, _TABLE[model.name][i], strict=True):
      at, best = _grid_index(published), int(np.argmin(abs(found - target)))
      outside = max(middles[at] - target, target - middles[at + 1], 0.0)
      found_cells.append(
        Cell(
          model=model.name,
          method=method.name,
          target=target,
          published_gbits=published,
          gbits=float(GRID_GBITS[best]),
          num_off=best - at,
          utilization=float(found[at]),
          points_off=100 * float(outside),
        )
      )
  return found_cells


def _grid_index(shown: float) -> int:
  """The place of the grid that the table shows so."""
  texts = [f'{round(gbits, 2):.1f}' for gbits in GRID_GBITS]
  return texts.index(f'{shown:.1f}')
