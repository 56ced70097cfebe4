"""A name for every leaf of a tree, so trees can be stored and compared.

A leaf's name joins its keys with slashes: `params/layers/mlp/up`,
`opt_state/0/mu/embed`. The containers are not stored: names, shapes and
dtypes are what a saved and a wanted tree must share.
"""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm.training import manifest


def named(tree: Any) -> dict[str, Any]:
  """The tree's leaves by name, in the tree's order.

  Raises:
    ValueError: If two leaves share a name or a key cannot be part of one.
  """
  leaves: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if not keys or any(not key or '/' in key for key in keys):
      raise ValueError(
        f'state keys must be non-empty and without slashes, got {keys}; '
        'rename them.'
      )
    leaves['/'.join(keys)] = leaf
  # Orbax joins keys with dots, so 'a.b' and 'a', 'b' are one array to it.
  stored = collections.Counter(name.replace('/', '.') for name in leaves)
  for name in leaves:
    if stored[name.replace('/', '.')] > 1:
      raise ValueError(f'state leaf {name} must be stored once; rename keys.')
  return leaves


def saveable(state: Any) -> dict[str, jax.Array | np.ndarray]:
  """The state's leaves by name: jax arrays, all else as numpy arrays.

  Raises:
    ValueError: If it holds no number, or a leaf that is not an array of them.
  """
  leaves = named(state)
  if all(0 in np.shape(leaf) for leaf in leaves.values()):
    raise ValueError('state must hold at least one number; add one.')
  for name, leaf in leaves.items():
    if isinstance(leaf, jax.Array):
      if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(
          f'state leaf {name} must be plain numbers, got {leaf.dtype}; save '
          'jax.random.key_data of it.'
        )
      continue
    leaves[name] = array = np.asarray(leaf)
    if array.dtype.kind in 'OSUMm':
      raise ValueError(
        f'state leaf {name} must be numbers, got {type(leaf).__name__}; put '
        'it in metadata.'
      )
  return leaves


def describe(leaves: Mapping[str, Any]) -> tuple[manifest.Leaf, ...]:
  """What the manifest says of named leaves."""
  return tuple(
    manifest.Leaf(name, tuple(leaf.shape), np.dtype(leaf.dtype).name)
    for name, leaf in leaves.items()
  )


def check_same(
  saved: Iterable[manifest.Leaf],
  wanted: Iterable[manifest.Leaf],
  *,
  origin: str,
) -> None:
  """Refuses a saved tree that is not the wanted one.

  Raises:
    ValueError: Naming the first leaf that differs, with both shapes.
  """
  saved_by_name = {leaf.path: leaf for leaf in saved}
  wanted_by_name = {leaf.path: leaf for leaf in wanted}
  for name in [*wanted_by_name, *saved_by_name]:
    ours, theirs = wanted_by_name.get(name), saved_by_name.get(name)
    if ours != theirs:
      raise ValueError(
        f'{origin} is of another model: leaf {name} is {_spell(theirs)} in it '
        f'and {_spell(ours)} here; use another --workdir or the same model '
        'configuration.'
      )


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Named leaves as nested dicts."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split('/')
    branch = tree
    for key in parents:
      branch = branch.setdefault(key, {})
    branch[last] = leaf
  return tree


def unflatten_as(tree: Any, leaves: Mapping[str, Any]) -> Any:
  """A tree of the same structure, with other leaves, found by name."""
  return jax.tree.unflatten(
    jax.tree.structure(tree), [leaves[name] for name in named(tree)]
  )


def _spell(leaf: manifest.Leaf | None) -> str:
  return f'{leaf.dtype}{list(leaf.shape)}' if leaf else 'absent'
