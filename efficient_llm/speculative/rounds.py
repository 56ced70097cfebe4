"""What runs on the device after prefill: rounds of draft, verify and commit."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm.models import kv_cache, transformer
from efficient_llm.speculative import rejection, verify
from efficient_llm.speculative import state as state_lib
from efficient_llm.speculative import tree as tree_lib
from efficient_llm.typing import Array, Params


def run(
  plan: state_lib.Plan,
  shape: tree_lib.DraftShape,
  params: Params,
  draft_params: Params | None,
  state: state_lib.State,
  num_rounds: Array,
  min_live: Array,
) -> state_lib.State:
  """Runs rounds until enough are done or rows have ended.

  Args:
    plan: What is decoded and how.
    shape: Of the trees; off is plain decoding.
    params: The target's, from `decoding.prepare`.
    draft_params: The drafter's, prepared as it wants them.
    state: The batch.
    num_rounds: Most rounds.
    min_live: Ends as soon as no more rows than this are live.
  """
  one_round = functools.partial(_round, plan, shape, params, draft_params)

  def going(loop: tuple[Array, state_lib.State]) -> Array:
    index, state = loop
    return (index < num_rounds) & ((~state.ended_B).sum() > min_live)

  def body(
    loop: tuple[Array, state_lib.State],
  ) -> tuple[Array, state_lib.State]:
    index, state = loop
    return index + 1, one_round(state)

  is_single = state.lengths_B.shape[0] == 1
  if is_single:
    state = _map_caches(kv_cache.KVCache.flat, state)
  state = jax.lax.while_loop(going, body, (jnp.int32(0), state))[1]
  return _map_caches(kv_cache.KVCache.unflat, state) if is_single else state


def resume(
  plan: state_lib.Plan,
  params: Params,
  draft_params: Params | None,
  state: state_lib.State,
) -> state_lib.State:
  """Brings the drafter's memory up to date after rounds without it."""
  assert plan.drafter is not None
  memory = plan.drafter.resume(draft_params, params, state)
  return dataclasses.replace(state, memory=memory)


def _map_caches(
  function: Callable[[kv_cache.KVCache], kv_cache.KVCache],
  state: state_lib.State,
) -> state_lib.State:
  """Changes the form of the target's and the drafter's caches."""

  def is_cache(x: Any) -> bool:
    return isinstance(x, kv_cache.KVCache)

  return jax.tree.map(
    lambda x: function(x) if is_cache(x) else x, state, is_leaf=is_cache
  )


def _round(
  plan: state_lib.Plan,
  shape: tree_lib.DraftShape,
  params: Params,
  draft_params: Params | None,
  state: state_lib.State,
) -> state_lib.State:
  if shape.is_off or plan.drafter is None:
    no_drafts_B0 = jnp.zeros((state.lengths_B.shape[0], 0), jnp.int32)
    tree, tail_mask_BWW = tree_lib.chain(state.newest_B, no_drafts_B0), None
  else:
    tree = plan.drafter.draft(draft_params, params, state, shape, plan.sampling)
    # A chain's nodes see what a causal tail sees.
    is_chain = shape.top_k == 1
    tail_mask_BWW = None if is_chain else tree_lib.ancestors(tree.parents_BW)
  output = transformer.apply(
    plan.model,
    params,
    tree.tokens_BW,
    positions_BT=state.cache.lengths_B[:, None] + tree.depths_BW,
    cache=state.cache,
    tail_mask_BTT=tail_mask_BWW,
    num_new_B=jnp.zeros_like(state.lengths_B),
    with_logits=False,
  )
  if shape.sampled:
    accept = rejection.accept
  else:
    accept = functools.partial(verify.accept, depth=shape.depth, draw=plan.draw)
  accepted = accept(
    tree,
    transformer.unembed(plan.model, params, output.hidden),
    state.keys_B,
    state.num_new_B,
    plan.sampling,
  )
  return _commit(plan, params, draft_params, state, output, accepted, shape)


def _commit(
  plan: state_lib.Plan,
  params: Params,
  draft_params: Params | None,
  state: state_lib.State,
  output: transformer.Output,
  accepted: verify.Accepted,
  shape: tree_lib.DraftShape,
) -> state_lib.State:
  """Writes what was accepted; rows that had ended stay as they are."""
  live_B = ~state.ended_B
  num_B = jnp.where(live_B, accepted.num_tokens_B, 0)
  assert output.cache is not None
  accepted = dataclasses.replace(accepted, num_tokens_B=num_B)
  memory = state.memory
  if plan.drafter is not None:
    hidden_BED = jnp.take_along_axis(
      output.hidden, accepted.path_BE[..., None], axis=1
    )
    memory = plan.drafter.observe(
      draft_params,
      params,
      state,
      accepted,
      hidden_BED,
      is_off=not shape.needs_model,
    )
  cache = output.cache
  if shape.top_k == 1:
    # What is accepted of a chain stands where it should.
    cache = cache.advance(num_B)
  else:
    cache = cache.commit(accepted.path_BE, num_B)
  return dataclasses.replace(
    state,
    cache=cache,
    tokens_BS=state_lib.write(
      state.tokens_BS, accepted.tokens_BE, state.lengths_B, num_B
    ),
    lengths_B=state.lengths_B + num_B,
    log_probs_BS=state_lib.write(
      state.log_probs_BS, accepted.log_probs_BE, state.lengths_B, num_B
    ),
    num_new_B=state.num_new_B + num_B,
    num_passes_B=state.num_passes_B + live_B,
    ended_B=state.ended_B | (live_B & accepted.ended_B),
    memory=memory,
  )
