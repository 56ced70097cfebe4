"""The train state: all that a step changes and a checkpoint holds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding, typing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """A pytree of arrays; `replace` makes changed copies.

  Attributes:
    step: Updates done, int32.
    params: Float32 parameters.
    opt_state: State of the optax transformation.
    key: Random key data; every step folds its number into it.
  """

  step: jax.Array
  params: typing.Params
  opt_state: typing.PyTree
  key: jax.Array

  def replace(self, **changes: typing.PyTree) -> 'TrainState':
    return dataclasses.replace(self, **changes)


def create(
  params: typing.Params,
  optimizer: optimizer_lib.Optimizer,
  key: jax.Array,
) -> TrainState:
  """State before the first step.

  Args:
    params: Initial parameters.
    optimizer: Whose state is made for them.
    key: A typed random key.
  """
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.transform.init(params),
    key=jax.random.key_data(key),
  )


def shardings(
  abstract_state: TrainState,
  axes: typing.PyTree,
  mesh: Mesh,
  *,
  rules: sharding.AxisRules = sharding.DEFAULT_RULES,
) -> TrainState:
  """A sharding for every leaf: moments lie where their parameters lie.

  Args:
    abstract_state: Its shapes.
    axes: Tree of LogicalAxes, one per parameter.
    mesh: The device mesh.
    rules: The rule table.

  Raises:
    ValueError: If a parameter cannot be cut as the rules say.
  """
  by_param = sharding.param_shardings(
    mesh, axes, abstract_state.params, rules=rules
  )
  whole: Any = sharding.replicated(mesh)
  return TrainState(
    step=whole,
    params=by_param,
    opt_state=optimizer_lib.like_params(
      abstract_state.opt_state, by_param, otherwise=whole
    ),
    key=whole,
  )


def abstract(
  abstract_state: typing.PyTree, state_shardings: typing.PyTree
) -> typing.PyTree:
  """Shapes, dtypes and shardings: what a checkpoint is restored into."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    abstract_state,
    state_shardings,
  )


def are_finite(tree: typing.PyTree) -> bool:
  """Whether every number of a tree is finite; on the host."""
  return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
