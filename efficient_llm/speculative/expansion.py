"""How the learned drafter widens the root: into a chain, or into a tree."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm.models import kv_cache, transformer
from efficient_llm.speculative import drafter as drafter_lib
from efficient_llm.speculative import rejection
from efficient_llm.speculative import tree as tree_lib
from efficient_llm.typing import Array, Params

# Below it a draft step costs more than it promises, of a target of few layers.
_MIN_PROB = 0.3


def chain(
  config: transformer.TransformerConfig,
  draft_params: Params,
  params: Params,
  cache: kv_cache.KVCache,
  feature_BD: Array,
  root_B: Array,
  shape: tree_lib.DraftShape,
  pick: rejection.Pick = rejection.likeliest,
) -> tree_lib.Tree:
  """One token again and again, the likeliest if not picked otherwise."""

  def step(carry: Any, level: Array) -> tuple[Any, Any]:
    cache, token_B, feature_BD = carry
    features, cache = forward(
      config, draft_params, params, token_B[:, None], feature_BD[:, None], cache
    )
    logits_BV = transformer.unembed(config, params, features[:, 0])
    token_B, law_BV = pick(logits_BV, level)
    return (cache, token_B, features[:, 0]), (token_B, law_BV)

  first = pick(transformer.unembed(config, params, feature_BD), 0)
  carry = (cache, first[0], feature_BD)
  _, others = jax.lax.scan(step, carry, jnp.arange(1, shape.depth))
  drafts_BD, laws_BDV = jax.tree.map(
    lambda x, xs: jnp.concatenate([x[:, None], jnp.swapaxes(xs, 0, 1)], 1),
    first,
    others,
  )
  chosen = tree_lib.chain(root_B, drafts_BD)
  return dataclasses.replace(chosen, log_probs_BKV=laws_BDV)


def early_chain(
  config: transformer.TransformerConfig,
  draft_params: Params,
  params: Params,
  cache: kv_cache.KVCache,
  feature_BD: Array,
  root_B: Array,
  shape: tree_lib.DraftShape,
  *,
  live_B: Array,
) -> tree_lib.Tree:
  """The likeliest token again and again, while the draft model believes in it.

  A row's chain ends before the first token that it gives less than
  `_MIN_PROB`, drafting with the last live row's. Which tokens are drafted
  depends on no coin, so any law of drawing stays as it is.
  """

  def add(
    chains: _Chains, cache: kv_cache.KVCache, feature_BD: Array
  ) -> _Chains:
    logits_BV = transformer.unembed(config, params, feature_BD)
    level = chains.level
    token_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
    log_prob_B = logits_BV.max(-1) - jax.nn.logsumexp(logits_BV, -1)
    longer_B = (chains.num_drafts_B == level) & (
      log_prob_B > math.log(_MIN_PROB)
    )
    return _Chains(
      level=level + 1,
      drafts_BD=chains.drafts_BD.at[:, level].set(token_B),
      num_drafts_B=chains.num_drafts_B + longer_B,
      feature_BD=feature_BD,
      cache=cache,
    )

  def going(chains: _Chains) -> Array:
    goes_on_B = (chains.num_drafts_B == chains.level) & live_B
    return (chains.level < shape.depth) & goes_on_B.any()

  def step(chains: _Chains) -> _Chains:
    features, cache = forward(
      config,
      draft_params,
      params,
      chains.drafts_BD[:, chains.level - 1, None],
      chains.feature_BD[:, None],
      chains.cache,
    )
    return add(chains, cache, features[:, 0])

  none = _Chains(
    level=jnp.int32(0),
    drafts_BD=jnp.zeros((len(root_B), shape.depth), jnp.int32),
    num_drafts_B=jnp.zeros_like(root_B),
    feature_BD=feature_BD,
    cache=cache,
  )
  chains = jax.lax.while_loop(going, step, add(none, cache, feature_BD))
  return tree_lib.chain(root_B, chains.drafts_BD, chains.num_drafts_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Chains:
  """Chains of a batch while they grow; `level` tokens were drafted so far."""

  level: Array
  drafts_BD: Array
  num_drafts_B: Array
  feature_BD: Array
  cache: kv_cache.KVCache


def tree(
  config: transformer.TransformerConfig,
  draft_params: Params,
  params: Params,
  cache: kv_cache.KVCache,
  feature_BD: Array,
  root_B: Array,
  shape: tree_lib.DraftShape,
) -> tree_lib.Tree:
  """Widens the likeliest paths level by level, then keeps the best nodes.

  The drafter runs anew over the paths of all levels so far: its one layer over
  a few dozen tokens costs less than keeping a branched cache.
  """
  batch_size, top_k = root_B.shape[0], shape.top_k
  log_probs_BV = _log_probs(config, params, feature_BD)
  scores_BK, tokens_BK = jax.lax.top_k(log_probs_BV, top_k)
  tokens, scores = [tokens_BK], [scores_BK]
  parents = [jnp.full((batch_size, top_k), -1, jnp.int32)]
  # The paths that are widened: candidate ids, and inputs of the drafter.
  frontier_BK = jnp.broadcast_to(jnp.arange(top_k), (batch_size, top_k))
  inputs_BJ, ups_BJ = tokens_BK, jnp.full((batch_size, top_k), -1)
  hidden_BJD = jnp.repeat(feature_BD[:, None], top_k, axis=1)
  depths = [0] * top_k
  for level in range(1, shape.depth):
    seen_BJJ = _seen(ups_BJ)
    features, _ = forward(
      config,
      draft_params,
      params,
      inputs_BJ,
      hidden_BJD,
      cache,
      depths=jnp.asarray(depths),
      tail_mask_BTT=seen_BJJ,
    )
    features_BKD = features[:, -top_k:]
    log_probs_BKV = _log_probs(config, params, features_BKD)
    best_BKC, tokens_BKC = jax.lax.top_k(log_probs_BKV, top_k)
    all_scores_BC = jnp.concatenate(scores, 1)
    above_BK1 = jnp.take_along_axis(all_scores_BC, frontier_BK, 1)[..., None]
    flat_scores_BC = (above_BK1 + best_BKC).reshape(batch_size, -1)
    flat_tokens_BC = tokens_BKC.reshape(batch_size, -1)
    offset = all_scores_BC.shape[1]
    tokens.append(flat_tokens_BC)
    scores.append(flat_scores_BC)
    parents.append(jnp.repeat(frontier_BK, top_k, axis=1))
    _, kept_BK = jax.lax.top_k(flat_scores_BC, top_k)
    frontier_BK = offset + kept_BK
    ups_BK = kept_BK // top_k
    inputs_BJ = jnp.concatenate(
      [inputs_BJ, jnp.take_along_axis(flat_tokens_BC, kept_BK, 1)], 1
    )
    hidden_BJD = jnp.concatenate(
      [hidden_BJD, jnp.take_along_axis(features_BKD, ups_BK[..., None], 1)], 1
    )
    ups_BJ = jnp.concatenate([ups_BJ, (level - 1) * top_k + ups_BK], 1)
    depths += [level] * top_k
  return tree_lib.select(
    root_B,
    jnp.concatenate(tokens, 1),
    jnp.concatenate(parents, 1),
    jnp.concatenate(scores, 1),
    num_nodes=shape.num_nodes,
  )


def _seen(ups_BJ: Array) -> Array:
  """Ancestors of a forest whose roots have parent -1."""
  # A root of its own in front makes it a tree.
  padding = ((0, 0), (1, 0))
  tree_BJ = jnp.pad(ups_BJ + 1, padding).astype(jnp.int32)
  return tree_lib.ancestors(tree_BJ)[:, 1:, 1:]


def forward(
  config: transformer.TransformerConfig,
  draft_params: Params,
  params: Params,
  next_tokens_BT: Array,
  hidden_BTD: Array,
  cache: kv_cache.KVCache,
  *,
  depths: Array | None = None,
  **more: Any,
) -> tuple[Array, kv_cache.KVCache]:
  """The drafter on pairs behind those of its cache, in a row by default."""
  positions_BT = None
  if depths is not None:
    positions_BT = cache.lengths_B[:, None] + depths
  hidden, cache_after = drafter_lib.forward(
    config,
    draft_params,
    params,
    next_tokens_BT,
    hidden_BTD,
    positions_BT=positions_BT,
    cache=cache,
    **more,
  )
  assert cache_after is not None
  return hidden, cache_after


def _log_probs(
  config: transformer.TransformerConfig, params: Params, features: Array
) -> Array:
  return jax.nn.log_softmax(transformer.unembed(config, params, features), -1)
