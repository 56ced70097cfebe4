"""Tests of the train state: what it holds and where its parts lie."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from efficient_llm import sharding
from efficient_llm.models import transformer
from efficient_llm.training import state
from tests import tiny

_MODEL = tiny.SMALL_VOCAB


def _make(name: str) -> state.TrainState:
  optimizer = tiny.optimizer(_MODEL, name=name)
  return state.create(tiny.params(_MODEL), optimizer, jax.random.key(7))


def _shardings(name: str) -> tuple[state.TrainState, Any]:
  sizes = (1, 1, 2, 2)
  mesh: Any = AbstractMesh(
    sizes, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 4
  )
  shapes = jax.eval_shape(lambda: _make(name))
  axes = transformer.logical_axes(_MODEL)
  return shapes, state.shardings(shapes, axes, mesh)


def test_a_new_state_is_at_step_0_and_keeps_the_key() -> None:
  made = _make('adamw')
  assert made.step == 0
  assert made.step.dtype == np.int32
  np.testing.assert_array_equal(
    made.key, jax.random.key_data(jax.random.key(7))
  )


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_every_moment_lies_where_its_parameter_lies(name: str) -> None:
  shapes, where = _shardings(name)
  params = {
    jax.tree_util.keystr(path): leaf.spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(where.params)
  }
  assert any(spec != PartitionSpec() for spec in params.values())
  num_moments = 0
  leaves = zip(
    jax.tree_util.tree_leaves_with_path(where.opt_state),
    jax.tree.leaves(shapes.opt_state),
    strict=True,
  )
  for (path, leaf), shape in leaves:
    name = jax.tree_util.keystr(path)
    owners = [param for param in params if name.endswith(param)]
    assert leaf.spec == (params[owners[0]] if owners else PartitionSpec())
    # What has no parameter is a counter, or Muon's coefficients.
    assert owners or shape.size <= 3
    num_moments += bool(owners)
  assert num_moments >= len(params)


def test_step_and_key_lie_whole_on_every_device() -> None:
  _, where = _shardings('adamw')
  assert where.step.spec == where.key.spec == PartitionSpec()


def test_the_abstract_state_has_the_shapes_dtypes_and_shardings() -> None:
  shapes, where = _shardings('adamw')
  abstract = state.abstract(shapes, where)
  jax.tree.map(
    lambda leaf, shape, place: (
      np.testing.assert_equal(leaf.shape, shape.shape),
      np.testing.assert_equal(leaf.dtype, shape.dtype),
      np.testing.assert_equal(leaf.sharding, place),
    ),
    abstract,
    shapes,
    where,
  )


def test_replace_leaves_the_original_alone() -> None:
  made = _make('adamw')
  changed = made.replace(step=made.step + 1)
  assert (made.step, changed.step) == (0, 1)
  assert changed.params is made.params
