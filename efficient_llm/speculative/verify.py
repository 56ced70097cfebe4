"""Lossless acceptance: which drafted tokens the target itself would have drawn.

At a node the target's next token is drawn with the coins that plain decoding
would use for it. If one of the children carries it, the walk goes on there;
otherwise it is the last token of the round. The drafts never see those coins,
so every token has the target's law, whatever was drafted; it even is the token
that `models.sampling.generate` draws with the same key, up to rounding. Chains
that were themselves drawn at random are for `kernels.speculative_sampling`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from efficient_llm.models import sampling as sampling_lib
from efficient_llm.speculative import tree as tree_lib
from efficient_llm.typing import Array, Float, Int, typed

# (logits_BV, keys_B, index_B, config) -> (token_B, log_prob_B).
Draw = Callable[..., tuple[Array, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Accepted:
  """What one round of a batch gives; E is the deepest path plus one.

  Attributes:
    tokens_BE: New tokens: the accepted drafts, then the one drawn last.
    log_probs_BE: Their log-probabilities under the law they were drawn from.
    num_tokens_B: How many of them count, from 1 to E.
    path_BE: Node at which each was drawn. The token drawn last has no node:
      the cache keeps the first `num_tokens_B` nodes of the path, the root among
      them.
    ended_B: Whether a stop token or the limit came.
  """

  tokens_BE: Int[Array, 'B E']
  log_probs_BE: Float[Array, 'B E']
  num_tokens_B: Int[Array, 'B']
  path_BE: Int[Array, 'B E']
  ended_B: Array


@typed
def accept(
  tree: tree_lib.Tree,
  logits_BWV: Float[Array, 'B W V'],
  keys_B: Array,
  index_B: Int[Array, 'B'],
  sampling: sampling_lib.SamplingConfig,
  *,
  depth: int,
  draw: Draw = sampling_lib.draw,
) -> Accepted:
  """Walks down from the root as far as the target's own draws lead.

  Args:
    tree: What was drafted, without looking at `keys_B`.
    logits_BWV: The target's logits at every node.
    keys_B: From `sampling.row_keys`.
    index_B: Number of the first new token in its completion.
    sampling: How to draw, when to stop, and the longest completion.
    depth: The deepest node of any tree.
    draw: In place of `sampling.draw`, to enumerate what can be drawn.
  Source: the law is that of Leviathan et al. 2023, arXiv:2211.17192, for a
    proposal that is certain; Miao et al. 2024, SpecInfer, arXiv:2305.09781,
    for trees. Differs: coupled to plain decoding through the coins.
  """
  batch_size, num_nodes = tree.tokens_BW.shape
  nodes_W = jnp.arange(num_nodes)
  real_BW = (nodes_W > 0) & (nodes_W < tree.num_nodes_B[:, None])
  stop_tokens = jnp.asarray(sampling.stop_tokens, jnp.int32)

  def step(carry: tuple, offset: Array) -> tuple[tuple, tuple]:
    node_B, going_B, ended_B = carry
    logits_BV = jnp.take_along_axis(logits_BWV, node_B[:, None, None], 1)[:, 0]
    token_B, log_prob_B = draw(logits_BV, keys_B, index_B + offset, sampling)
    is_last_B = index_B + offset + 1 >= sampling.max_new_tokens
    ended_B |= going_B & (jnp.isin(token_B, stop_tokens) | is_last_B)
    found_BW = real_BW & (tree.parents_BW == node_B[:, None])
    found_BW &= tree.tokens_BW == token_B[:, None]
    next_B = jnp.where(
      found_BW.any(1), jnp.argmax(found_BW, 1).astype(jnp.int32), node_B
    )
    goes_on_B = going_B & ~ended_B & found_BW.any(1)
    drawn = (token_B, log_prob_B, node_B, going_B)
    return (next_B, goes_on_B, ended_B), drawn

  start = (
    jnp.zeros(batch_size, jnp.int32),
    jnp.ones(batch_size, bool),
    jnp.zeros(batch_size, bool),
  )
  (_, _, ended_B), (tokens, log_probs, path, drawn) = jax.lax.scan(
    step, start, jnp.arange(depth + 1, dtype=jnp.int32)
  )
  drawn_BE = drawn.T
  return Accepted(
    tokens_BE=jnp.where(drawn_BE, tokens.T, 0),
    log_probs_BE=jnp.where(drawn_BE, log_probs.T, 0.0),
    num_tokens_B=drawn_BE.sum(1, dtype=jnp.int32),
    path_BE=path.T,
    ended_B=ended_B,
  )
