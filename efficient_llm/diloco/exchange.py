"""A sync: updates are encoded, sent, judged, merged, applied.

Pure functions of the whole state, compiled by `mesh`. Large arrays cross from
island to island in `gather` alone, as they were encoded.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from efficient_llm import typing
from efficient_llm.diloco import compression, outer, screening
from efficient_llm.diloco import fragments as fragments_lib
from efficient_llm.diloco.config import DilocoConfig
from efficient_llm.diloco.state import KEEP, MIX, REPLACE, DilocoState


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a round needs besides the state.

  Attributes:
    config: The run.
    optimizer: The outer one.
    fragments: How the model is cut.
  """

  config: DilocoConfig
  optimizer: optax.GradientTransformation
  fragments: fragments_lib.Fragments


@dataclasses.dataclass(frozen=True)
class Round:
  """Updates that have arrived, judged.

  Attributes:
    deltas_M: Decoded outer gradients of all islands, on all of them.
    weights_M: Tokens; 0 for islands that sent nothing or were refused.
    local_M: The islands' parameters, where nothing is rounded on the way.
    reached_M: Islands that could send.
    verdict: What was found.
  """

  deltas_M: typing.PyTree
  weights_M: jax.Array
  local_M: typing.PyTree | None
  reached_M: jax.Array
  verdict: screening.Verdict

  @property
  def refused_M(self) -> jax.Array:
    return self.verdict.codes_M > 0


def send(
  state: DilocoState,
  reached_M: jax.Array,
  *,
  setup: Setup,
  fragment: int,
) -> tuple[DilocoState, typing.Metrics]:
  """Merges a fragment's updates and steps the shared parameters.

  Args:
    state: Of the run.
    reached_M: Islands that can send.
    setup: The method's parts.
    fragment: Of the model.

  Returns:
    The new state and metrics; islands apply it by `apply`.

  Source: Douillard et al. 2023, Algorithm 1, arXiv:2311.08105; with fragments
  Douillard et al. 2025, arXiv:2501.18512.
  """
  shared = outer.OuterState(
    setup.fragments.take(state.params, fragment),
    state.outer[fragment],
    state.versions_P[fragment],
  )
  state, found = exchange(state, reached_M, setup=setup, fragment=fragment)
  averaged = None
  if found.local_M is not None and setup.config.screening.merge == 'mean':
    averaged = outer.weighted_mean(found.local_M, found.weights_M)
  new = outer.outer_step(
    shared,
    found.deltas_M,
    found.weights_M,
    optimizer=setup.optimizer,
    merge=_merger(setup.config),
    averaged=averaged,
  )
  opt_states = list(state.outer)
  next_M = jnp.where(found.reached_M, MIX, KEEP)
  next_M = jnp.where(found.refused_M, REPLACE, next_M)
  opt_states[fragment] = new.opt_state
  moved = jax.tree.map(jnp.subtract, new.params, shared.params)
  state = state.replace(
    params=setup.fragments.put(state.params, fragment, new.params),
    outer=tuple(opt_states),
    versions_P=state.versions_P.at[fragment].set(new.version),
    adoption_PM=state.adoption_PM.at[fragment].set(next_M),
  )
  return state, metrics(found, moved)


def apply(state: DilocoState, *, setup: Setup, fragment: int) -> DilocoState:
  """Hands a fragment that was sent to the islands.

  Each keeps a share `fragments.mixing` of its own parameters. An island that
  was refused takes all the shared parameters, not only this fragment: its
  others are as bad.
  """
  mixing = setup.config.fragments.mixing
  codes_M = state.adoption_PM[fragment]
  mine = setup.fragments.take(state.islands.params, fragment, lead=1)
  shared = setup.fragments.take(state.params, fragment)

  def mixed(own_M: jax.Array, x: jax.Array) -> jax.Array:
    new_M = jnp.broadcast_to(x, own_M.shape)
    if mixing:
      new_M = mixing * own_M + (1 - mixing) * x
    return jnp.where(outer.wide(codes_M == MIX, own_M), new_M, own_M)

  params = setup.fragments.put(
    state.islands.params,
    fragment,
    jax.tree.map(mixed, mine, shared),
    lead=1,
  )
  islands = state.islands.replace(params=params)
  state = state.replace(
    islands=islands,
    adoption_PM=state.adoption_PM.at[fragment].set(KEEP),
  )
  refused_M = codes_M == REPLACE
  return jax.lax.cond(
    refused_M.any(), lambda s: adopt(s, refused_M), lambda s: s, state
  )


def adopt(state: DilocoState, which_M: jax.Array) -> DilocoState:
  """Gives some islands all shared parameters; they owe nothing any more.

  Their inner moments stay, but for values that are not finite, which become 0.
  """

  def shared(own_M: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(outer.wide(which_M, own_M), x, own_M)

  def sound(x_M: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x_M.dtype, jnp.floating):
      return x_M
    return jnp.where(outer.wide(which_M, x_M) & ~jnp.isfinite(x_M), 0.0, x_M)

  islands = state.islands
  return state.replace(
    islands=islands.replace(
      params=jax.tree.map(shared, islands.params, state.params),
      opt_state=jax.tree.map(sound, islands.opt_state),
    ),
    anchors=jax.tree.map(shared, state.anchors, state.params)
    if state.anchors
    else {},
    residuals=jax.tree.map(
      lambda x_M: jnp.where(outer.wide(which_M, x_M), 0.0, x_M), state.residuals
    ),
    tokens_PM=jnp.where(which_M, 0.0, state.tokens_PM),
    adoption_PM=jnp.where(which_M, KEEP, state.adoption_PM),
  )


def exchange(
  state: DilocoState, reached_M: jax.Array, *, setup: Setup, fragment: int
) -> tuple[DilocoState, Round]:
  """Brings the islands' updates of a fragment to all of them.

  Args:
    state: Of the run; what it knows of senders is brought up to date.
    reached_M: Islands that can send.
    setup: The method's parts.
    fragment: Of the model.
  """
  config, take = setup.config, setup.fragments.take
  if state.anchors:
    start = take(state.anchors, fragment, lead=1)
  else:
    start = take(state.params, fragment)
  local_M = take(state.islands.params, fragment, lead=1)
  owed_M = None
  if config.compression.is_exact:
    local_M = gather(local_M)
    if state.anchors:
      start = gather(start)
    deltas_M = jax.tree.map(jnp.subtract, start, local_M)
  else:
    deltas_M = jax.tree.map(jnp.subtract, start, local_M)
    local_M = None
    if state.residuals:
      owed_M = take(state.residuals, fragment, lead=1)
    encoded_M, _, owed_M = jax.vmap(
      lambda delta, owed: compression.compress(delta, owed, config.compression)
    )(deltas_M, owed_M)
    deltas_M = jax.vmap(compression.decode_tree)(gather(encoded_M))
  # Said once more: else the compiler may part by island what follows, and let
  # full-width values cross.
  deltas_M = gather(deltas_M)
  tokens_M = gather(state.tokens_PM[fragment])
  weights_M = jnp.where(reached_M, tokens_M, 0.0)
  seen_MR = state.prints_PMR[fragment]
  verdict = screening.judge(deltas_M, weights_M, seen_MR, config.screening)
  refused_M = verdict.codes_M > 0
  found = Round(
    deltas_M=deltas_M,
    weights_M=jnp.where(refused_M, 0.0, weights_M),
    local_M=None if state.anchors else local_M,
    reached_M=reached_M,
    verdict=verdict,
  )
  kept_MR = jnp.concatenate(
    [verdict.prints_M[:, None], seen_MR[:, :-1]], axis=1
  )
  state = state.replace(
    tokens_PM=state.tokens_PM.at[fragment].set(
      jnp.where(reached_M, 0.0, state.tokens_PM[fragment])
    ),
    prints_PMR=state.prints_PMR.at[fragment].set(
      jnp.where((weights_M > 0)[:, None], kept_MR, seen_MR)
    ),
  )
  if owed_M is not None:
    before_M = take(state.residuals, fragment, lead=1)
    owed_M = jax.tree.map(
      lambda new_M, old_M: jnp.where(
        outer.wide(reached_M, old_M), new_M, old_M
      ),
      owed_M,
      before_M,
    )
    residuals = setup.fragments.put(state.residuals, fragment, owed_M, lead=1)
    state = state.replace(residuals=residuals)
  return state, found


def gather(tree_M: typing.PyTree) -> typing.PyTree:
  """Brings every island's part to all islands; within one nothing moves."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree_M

  def one(x_M: jax.Array) -> jax.Array:
    inside = (PartitionSpec.UNCONSTRAINED,) * (x_M.ndim - 1)
    spec = PartitionSpec(None, *inside)
    if not _is_half(x_M.dtype):
      return jax.lax.with_sharding_constraint(x_M, spec)
    # As integers, since XLA sends half floats in full width on CPUs.
    bits_M = jax.lax.bitcast_convert_type(x_M, jnp.uint16)
    bits_M = jax.lax.with_sharding_constraint(bits_M, spec)
    return jax.lax.bitcast_convert_type(bits_M, x_M.dtype)

  return jax.tree.map(one, tree_M)


def _is_half(dtype: jnp.dtype) -> bool:
  return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2


def metrics(found: Round, moved: typing.PyTree) -> typing.Metrics:
  """What is reported of a round; arrays by island.

  Args:
    found: Its updates.
    moved: By how much the shared parameters changed.
  """
  return {
    'norms_M': found.verdict.norms_M,
    'cosines_M': found.verdict.cosines_M,
    'codes_M': found.verdict.codes_M,
    'sent_M': found.reached_M,
    'moved': optax.tree.norm(moved),
  }


def _merger(config: DilocoConfig) -> outer.Merge:
  if config.compression.density is not None and (
    config.screening.merge == 'mean'
  ):
    return outer.mean_where_sent
  return screening.merger(config.screening)
