"""Rounds of methods in which islands do not all wait for one average.

Pure functions of the whole state, as in `exchange`. Islands are measured from
parameters of their own, `anchors`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm import typing
from efficient_llm.diloco import exchange, outer
from efficient_llm.diloco.state import DilocoState


def send_eagerly(
  state: DilocoState, reached_M: jax.Array, *, setup: exchange.Setup
) -> tuple[DilocoState, typing.Metrics]:
  """Applies the last round's average, an island's own part of it renewed.

  An island steps its own copy of the shared parameters by its fresh update,
  weighted, plus what the others gave to the average a round ago. In the first
  round, when there is none, its own update stands for all.

  Source: Kale et al. 2025, arXiv:2502.12996.
  """
  state, found = exchange.exchange(state, reached_M, setup=setup, fragment=0)
  total = jnp.sum(found.weights_M)
  shares_M = found.weights_M / jnp.where(total > 0, total, 1.0)
  is_first = state.versions_P[0] == 0
  mean = outer.weighted_mean(found.deltas_M, found.weights_M)

  def part(x_M: jax.Array) -> jax.Array:
    share_M = outer.wide(shares_M, x_M)
    return jnp.where(share_M > 0, share_M * x_M, 0.0)

  parts_M = jax.tree.map(part, found.deltas_M)
  take, put = setup.fragments.take, setup.fragments.put
  others = take(state.others, 0, lead=1)
  gradients_M = jax.tree.map(
    lambda own_M, mine_M, rest_M: jnp.where(is_first, own_M, mine_M + rest_M),
    found.deltas_M,
    parts_M,
    others,
  )
  others = jax.tree.map(lambda x, mine_M: x - mine_M, mean, parts_M)
  anchors = take(state.anchors, 0, lead=1)
  new_M = jax.vmap(
    lambda params, opt_state, gradient: outer.apply_gradient(
      outer.OuterState(params, opt_state, jnp.int32(0)),
      gradient,
      optimizer=setup.optimizer,
    )
  )(anchors, state.outer[0], gradients_M)
  stepped_M = found.reached_M & ~found.refused_M & (total > 0)
  state = state.replace(others=put(state.others, 0, others, lead=1))
  return _own_steps(
    state,
    new_M.params,
    new_M.opt_state,
    stepped_M,
    found=found,
    setup=setup,
  )


def send_in_pairs(
  state: DilocoState,
  reached_M: jax.Array,
  partners_M: jax.Array,
  *,
  setup: exchange.Setup,
) -> tuple[DilocoState, typing.Metrics]:
  """Averages updates and parameters in pairs; nothing is shared by all.

  With phi an island's outer parameters and bars for means over its pair:

    m <- mu m + eta (mean(theta - phi)) + eta (mean(phi) - phi),  phi <- phi + m

  Args:
    state: Of the run.
    reached_M: Islands that can send.
    partners_M: Whom each is paired with, itself where it is left over.
    setup: The method's parts.

  Source: Kolehmainen et al. 2025, arXiv:2506.10911.
  """
  config = setup.config.outer
  state, found = exchange.exchange(state, reached_M, setup=setup, fragment=0)
  fine_M = found.reached_M & ~found.refused_M & (found.weights_M > 0)
  alone_M = jnp.arange(partners_M.shape[0])
  partners_M = jnp.where(fine_M & fine_M[partners_M], partners_M, alone_M)
  anchors = setup.fragments.take(state.anchors, 0, lead=1)
  anchors = exchange.gather(anchors)
  rate = config.learning_rate
  if rate is None:
    rate = outer.recommended_rate(setup.config.islands)

  def moved(m_M: jax.Array, delta_M: jax.Array, phi_M: jax.Array) -> jax.Array:
    mean_delta_M = (delta_M + delta_M[partners_M]) / 2
    mean_phi_M = (phi_M + phi_M[partners_M]) / 2
    return config.momentum * m_M + rate * (mean_phi_M - phi_M - mean_delta_M)

  momentum_M = jax.tree.map(moved, state.outer[0], found.deltas_M, anchors)
  params_M = jax.tree.map(jnp.add, anchors, momentum_M)
  return _own_steps(
    state, params_M, momentum_M, fine_M, found=found, setup=setup
  )


def send_as_they_arrive(
  state: DilocoState, reached_M: jax.Array, *, setup: exchange.Setup
) -> tuple[DilocoState, typing.Metrics]:
  """Applies updates one by one; each sender takes what then is shared.

  Source: Liu et al. 2024, arXiv:2401.09135.
  """
  state, found = exchange.exchange(state, reached_M, setup=setup, fragment=0)
  before = setup.fragments.take(state.params, 0)
  shared = outer.OuterState(before, state.outer[0], state.versions_P[0])
  local_M = setup.fragments.take(state.islands.params, 0, lead=1)

  def arrive(shared: outer.OuterState, update: Any) -> tuple[Any, Any]:
    delta, weight, reached, own = update
    new = outer.outer_step(
      shared,
      jax.tree.map(lambda x: x[None], delta),
      weight[None] > 0,
      optimizer=setup.optimizer,
    )
    took = jax.tree.map(lambda x, y: jnp.where(reached, x, y), new.params, own)
    return new, took

  shared, took_M = jax.lax.scan(
    arrive, shared, (found.deltas_M, found.weights_M, found.reached_M, local_M)
  )
  anchors = setup.fragments.take(state.anchors, 0, lead=1)
  anchors = jax.tree.map(
    lambda new_M, old_M: jnp.where(
      outer.wide(found.reached_M, old_M), new_M, old_M
    ),
    took_M,
    anchors,
  )
  put = setup.fragments.put
  state = state.replace(
    params=put(state.params, 0, shared.params),
    outer=(shared.opt_state,),
    versions_P=state.versions_P.at[0].set(shared.version),
    anchors=put(state.anchors, 0, anchors, lead=1),
    islands=state.islands.replace(
      params=put(state.islands.params, 0, took_M, lead=1)
    ),
  )
  state = exchange.adopt(state, found.refused_M)
  moved = jax.tree.map(jnp.subtract, shared.params, before)
  return state, exchange.metrics(found, moved)


def _own_steps(
  state: DilocoState,
  params_M: typing.PyTree,
  outer_M: Any,
  stepped_M: jax.Array,
  *,
  found: exchange.Round,
  setup: exchange.Setup,
) -> tuple[DilocoState, typing.Metrics]:
  """Islands that could step go on from their own new outer parameters."""

  def chosen(new_M: jax.Array, old_M: jax.Array) -> jax.Array:
    return jnp.where(outer.wide(stepped_M, old_M), new_M, old_M)

  take, put = setup.fragments.take, setup.fragments.put
  before = take(state.params, 0)
  anchors = jax.tree.map(chosen, params_M, take(state.anchors, 0, lead=1))
  local_M = take(state.islands.params, 0, lead=1)
  local_M = jax.tree.map(chosen, params_M, local_M)
  mean = outer.weighted_mean(
    exchange.gather(anchors), jnp.ones(stepped_M.shape)
  )
  state = state.replace(
    params=put(state.params, 0, mean),
    anchors=put(state.anchors, 0, anchors, lead=1),
    outer=(jax.tree.map(chosen, outer_M, state.outer[0]),),
    versions_P=state.versions_P + stepped_M.any(),
    islands=state.islands.replace(
      params=put(state.islands.params, 0, local_M, lead=1)
    ),
  )
  state = exchange.adopt(state, found.refused_M)
  moved = jax.tree.map(jnp.subtract, mean, before)
  return state, exchange.metrics(found, moved)
