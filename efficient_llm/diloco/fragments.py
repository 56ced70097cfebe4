"""Parts of a model that are sent at different times (Streaming DiLoCo).

Layers are dealt to fragments; what belongs to no layer goes with the first
(embedding) or the last one. A fragment is a flat dict of arrays by leaf name,
holding only its layers, so that only those are sent.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax

from efficient_llm import typing
from efficient_llm.training import tree_names


@dataclasses.dataclass(frozen=True)
class FragmentConfig:
  """How a model is cut, and how long its parts are under way.

  Attributes:
    count: Parts, sent at even distances within a sync period.
    overlap_steps: Inner steps between sending a part and applying what came
      of it; training goes on meanwhile.
    mixing: Share of its own parameters that an island keeps when it applies a
      part; 0 takes the shared ones.
    pattern: 'strided' deals layers out one by one, 'sequential' in a row.
  """

  count: int = 1
  overlap_steps: int = 0
  mixing: float = 0.0
  pattern: Literal['strided', 'sequential'] = 'strided'

  def check(self, *, num_layers: int, sync_period: int) -> None:
    """Raises ValueError if a setting breaks a rule, in one line."""
    typing.check_choices(self, name='fragments')
    largest = min(num_layers, sync_period)
    if not 1 <= self.count <= largest:
      raise ValueError(
        f'fragments.count={self.count} must be in [1, {largest}], neither more '
        'than model.num_layers nor than sync_period; lower it.'
      )
    if not 0 <= self.overlap_steps < sync_period:
      raise ValueError(
        f'fragments.overlap_steps={self.overlap_steps} must be at least 0 and '
        f'below {sync_period=}; lower it.'
      )
    if not 0 <= self.mixing <= 1:
      raise ValueError(
        f'fragments.mixing={self.mixing} must be in [0, 1]; set 0.5.'
      )


class Fragments:
  """Takes fragments out of trees like the parameters, and puts them back.

  Args:
    config: How the model is cut.
    axes: Tree of LogicalAxes, one per parameter.
    num_layers: Size of the 'layers' axis.
  """

  def __init__(
    self, config: FragmentConfig, axes: typing.PyTree, *, num_layers: int
  ):
    self.count = config.count
    self._rows: dict[str, list[slice | None]] = {}
    for name, leaf in _named(axes).items():
      rows: list[slice | None]
      if leaf.stack == ('layers',):
        rows = [
          _rows(config, fragment, num_layers) for fragment in range(self.count)
        ]
      else:
        home = 0 if name.startswith('embedding.') else self.count - 1
        rows = [
          slice(None) if fragment == home else None
          for fragment in range(self.count)
        ]
      self._rows[name] = rows

  def take(
    self, tree: typing.PyTree, fragment: int, *, lead: int = 0
  ) -> dict[str, Any]:
    """The leaves and layers of a fragment, by leaf name.

    Args:
      tree: Like the parameters.
      fragment: Its number.
      lead: Further leading axes of every leaf (the islands').
    """
    taken = {}
    for name, leaf in _named(tree).items():
      rows = self._rows[name][fragment]
      if rows is not None:
        is_all = rows == slice(None)
        taken[name] = leaf if is_all else leaf[(slice(None),) * lead + (rows,)]
    return taken

  def put(
    self,
    tree: typing.PyTree,
    fragment: int,
    values: Mapping[str, Any],
    *,
    lead: int = 0,
  ) -> typing.PyTree:
    """The tree with a fragment replaced."""
    leaves = _named(tree)
    for name, value in values.items():
      rows = self._rows[name][fragment]
      if rows == slice(None):
        leaves[name] = value
      else:
        leaves[name] = (
          leaves[name].at[(slice(None),) * lead + (rows,)].set(value)
        )
    return jax.tree.unflatten(jax.tree.structure(tree), leaves.values())

  def whole(self, tree: typing.PyTree, fragment: int) -> dict[str, Any]:
    """Whole leaves of which a fragment has some layers, such as shardings."""
    return {
      name: leaf
      for name, leaf in _named(tree).items()
      if self._rows[name][fragment] is not None
    }


def offset(fragment: int, *, count: int, sync_period: int) -> int:
  """Inner steps by which a fragment is sent after the first one."""
  return fragment * sync_period // count


def _named(tree: typing.PyTree) -> dict[str, Any]:
  """Leaves by name; checkpoints do not take slashes in a key."""
  named = tree_names.named(tree)
  return {name.replace('/', '.'): leaf for name, leaf in named.items()}


def _rows(config: FragmentConfig, fragment: int, num_layers: int) -> slice:
  if config.count == 1:
    return slice(None)
  if config.pattern == 'strided':
    return slice(fragment, None, config.count)
  bounds = [num_layers * i // config.count for i in (fragment, fragment + 1)]
  return slice(*bounds)
