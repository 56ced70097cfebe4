"""The state of a run of islands: all that steps change and checkpoints hold."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding, typing
from efficient_llm.diloco import fragments as fragments_lib
from efficient_llm.diloco import outer as outer_lib
from efficient_llm.training import state as state_lib

# Rounds in which an update sent again is still recognised.
PRINTS_KEPT = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DilocoState:
  """A pytree of arrays; `replace` makes changed copies.

  Attributes:
    step: Inner steps done, int32.
    params: What all islands share, and what is evaluated; without sharing, the
      islands' mean.
    outer: State of the outer optimiser, by fragment; with a leading island axis
      where islands step on their own.
    versions_P: Outer steps of each fragment, int32.
    islands: The inner train states, stacked along the island axis.
    anchors: What each island's update is measured from, stacked, where that is
      not `params`; else empty.
    others: For eager updates, what the other islands gave to the last average,
      stacked; else empty.
    residuals: What islands owe because it could not be sent, stacked; else
      empty.
    tokens_PM: Target tokens each island trained on since it sent a fragment.
    adoption_PM: What an island does with a fragment that was sent: `KEEP`,
      `MIX` or `REPLACE`; int32.
    prints_PMR: Fingerprints of the last updates, uint32.
  """

  step: jax.Array
  params: typing.Params
  outer: tuple[Any, ...]
  versions_P: jax.Array
  islands: state_lib.TrainState
  anchors: typing.PyTree
  others: typing.PyTree
  residuals: typing.PyTree
  tokens_PM: jax.Array
  adoption_PM: jax.Array
  prints_PMR: jax.Array

  def replace(self, **changes: Any) -> 'DilocoState':
    return dataclasses.replace(self, **changes)


KEEP, MIX, REPLACE = 0, 1, 2


def stack(tree: typing.PyTree, num_islands: int) -> typing.PyTree:
  """Copies along a new leading island axis."""
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x, (num_islands, *jnp.shape(x))), tree
  )


def create(
  inner: state_lib.TrainState,
  *,
  num_islands: int,
  outer: tuple[Any, ...],
  has_anchors: bool,
  has_others: bool,
  has_residuals: bool,
) -> DilocoState:
  """State before the first step; every island starts from the same parameters.

  Args:
    inner: Of plain training, whose key is that of the first island.
    num_islands: How many there are.
    outer: State of the outer optimiser, by fragment.
    has_anchors: Whether islands are measured from parameters of their own.
    has_others: Whether averages are taken apart.
    has_residuals: Whether there is error feedback.
  """
  count = len(outer)
  key = jax.random.wrap_key_data(inner.key)
  keys_M = jnp.stack(
    [inner.key]
    + [
      jax.random.key_data(jax.random.fold_in(key, m))
      for m in range(1, num_islands)
    ]
  )
  stacked = stack(inner, num_islands).replace(key=keys_M)
  zeros = jax.tree.map(jnp.zeros_like, stacked.params)
  shape = (count, num_islands)
  return DilocoState(
    step=jnp.int32(0),
    params=inner.params,
    outer=outer,
    versions_P=jnp.zeros(count, jnp.int32),
    islands=stacked,
    anchors=stacked.params if has_anchors else {},
    others=zeros if has_others else {},
    residuals=zeros if has_residuals else {},
    tokens_PM=jnp.zeros(shape),
    adoption_PM=jnp.zeros(shape, jnp.int32),
    prints_PMR=jnp.zeros((*shape, PRINTS_KEPT), jnp.uint32),
  )


def started(state: DilocoState, params: typing.Params) -> DilocoState:
  """The state before the first step, of islands that start from these."""
  num_islands = state.tokens_PM.shape[1]
  stacked = stack(params, num_islands)
  return state.replace(
    params=params,
    islands=state.islands.replace(params=stacked),
    anchors=stacked if state.anchors else {},
  )


def resize(
  state: DilocoState, *, num_islands: int, has_own_outer: bool
) -> DilocoState:
  """The state for another number of islands.

  Those beyond the old number take the shared parameters and the inner moments
  of the islands before, in turn. What the last ones have not sent when there
  are fewer is given up.

  Args:
    state: Of the run so far.
    num_islands: From now on.
    has_own_outer: Whether the outer state has an island axis.
  """
  old = state.tokens_PM.shape[1]
  donors_M = jnp.arange(num_islands) % old
  is_new_M = jnp.arange(num_islands) >= old

  def of_donor(tree: Any) -> Any:
    return jax.tree.map(lambda x_M: x_M[donors_M], tree)

  def fresh(x_M: jax.Array, value: Any) -> jax.Array:
    return jnp.where(outer_lib.wide(is_new_M, x_M), value, x_M)

  islands = of_donor(state.islands)
  key = jax.random.wrap_key_data(state.islands.key[0])
  keys_M = jax.vmap(lambda m: jax.random.key_data(jax.random.fold_in(key, m)))(
    jnp.arange(num_islands)
  )
  params = jax.tree.map(fresh, islands.params, state.params)
  residuals = of_donor(state.residuals)
  return state.replace(
    outer=of_donor(state.outer) if has_own_outer else state.outer,
    islands=islands.replace(params=params, key=fresh(islands.key, keys_M)),
    anchors=jax.tree.map(fresh, of_donor(state.anchors), state.params)
    if state.anchors
    else {},
    others=of_donor(state.others),
    residuals=jax.tree.map(lambda x_M: fresh(x_M, 0.0), residuals),
    tokens_PM=jnp.where(is_new_M, 0.0, state.tokens_PM[:, donors_M]),
    adoption_PM=jnp.where(is_new_M, KEEP, state.adoption_PM[:, donors_M]),
    prints_PMR=jnp.where(
      is_new_M[:, None], jnp.uint32(0), state.prints_PMR[:, donors_M]
    ),
  )


def shardings(
  abstract_state: DilocoState,
  axes: typing.PyTree,
  mesh: Mesh,
  *,
  fragments: fragments_lib.Fragments,
  has_own_outer: bool,
) -> DilocoState:
  """A sharding for every leaf: an island's arrays lie on its devices.

  Args:
    abstract_state: Its shapes.
    axes: Tree of LogicalAxes, one per parameter.
    mesh: The device mesh.
    fragments: How the model is cut.
    has_own_outer: Whether the outer state has an island axis.
  """
  num_islands = abstract_state.tokens_PM.shape[1]
  # A checkpoint may be of another number, which these devices cannot share.
  divides = num_islands % mesh.shape['island'] == 0
  lead = 'island' if divides else 'other_islands'
  shared = sharding.param_shardings(mesh, axes, abstract_state.params)
  own = sharding.param_shardings(
    mesh,
    jax.tree.map(lambda leaf: leaf.stacked(lead), axes),
    abstract_state.islands.params,
  )
  whole: Any = sharding.replicated(mesh)
  each: Any = NamedSharding(mesh, PartitionSpec('island')) if divides else whole
  by_island: Any = NamedSharding(mesh, PartitionSpec(None, *each.spec))

  def like(tree: Any, where: Any, *, otherwise: Any) -> Any:
    return optimizer_lib.like_params(tree, where, otherwise=otherwise)

  outer = tuple(
    like(
      outer,
      fragments.whole(own if has_own_outer else shared, p),
      otherwise=each if has_own_outer else whole,
    )
    for p, outer in enumerate(abstract_state.outer)
  )
  islands = abstract_state.islands
  return DilocoState(
    step=whole,
    params=shared,
    outer=outer,
    versions_P=whole,
    islands=state_lib.TrainState(
      step=each,
      params=own,
      opt_state=like(islands.opt_state, own, otherwise=each),
      key=each,
    ),
    anchors=own if abstract_state.anchors else {},
    others=own if abstract_state.others else {},
    residuals=own if abstract_state.residuals else {},
    tokens_PM=by_island,
    adoption_PM=whole,
    prints_PMR=whole,
  )
