"""Tests of taking fragments out of a model and putting them back."""

from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm.diloco import fragments
from tests.diloco import toy_islands


def _fragments(count: int, pattern: Any = 'strided') -> fragments.Fragments:
  config = fragments.FragmentConfig(count, pattern=pattern)
  return fragments.Fragments(
    config, toy_islands.AXES, num_layers=toy_islands.NUM_LAYERS
  )


@pytest.mark.parametrize('pattern', ['strided', 'sequential'])
@pytest.mark.parametrize('count', [1, 2, 3])
def test_every_number_is_in_exactly_one_fragment(
  count: int, pattern: str
) -> None:
  size = toy_islands.flat(toy_islands.params()).size
  leaves, tree = jax.tree.flatten(toy_islands.params())
  ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
  numbers = [
    part.reshape(leaf.shape)
    for part, leaf in zip(np.split(np.arange(size), ends), leaves, strict=True)
  ]
  numbered = jax.tree.unflatten(tree, numbers)
  parts = _fragments(count, pattern)
  taken = [
    toy_islands.flat(parts.take(numbered, fragment))
    for fragment in range(count)
  ]
  assert sorted(np.concatenate(taken)) == list(range(size))


def test_layers_are_dealt_out_one_by_one_or_in_a_row() -> None:
  layers = {'layers': {'w': np.arange(3)[:, None] * np.ones((1, 2))}}
  tree = {**toy_islands.params(), **layers}
  strided = _fragments(2).take(tree, 0)['layers.w'][:, 0]
  sequential = _fragments(2, 'sequential').take(tree, 0)['layers.w'][:, 0]
  assert strided.tolist() == [0, 2]
  assert sequential.tolist() == [0]


@pytest.mark.parametrize('lead', [0, 1])
def test_what_was_taken_goes_back_to_its_place(lead: int) -> None:
  old, new = (
    jax.tree.map(lambda x: jax.numpy.stack([x] * 2) if lead else x, tree)
    for tree in (toy_islands.params(0), toy_islands.params(1))
  )
  old = jax.tree.map(jax.numpy.asarray, old)
  parts = _fragments(2)
  for fragment in range(2):
    taken = parts.take(new, fragment, lead=lead)
    old = parts.put(old, fragment, taken, lead=lead)
  jax.tree.map(np.testing.assert_array_equal, old, new)
