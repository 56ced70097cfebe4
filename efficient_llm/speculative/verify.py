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
  # All nodes draw at once: which coins a node has depends on its depth alone.
  index_BW = index_B[:, None] + tree.depths_BW
  drawn, log_probs = draw(
    logits_BWV.reshape(batch_size * num_nodes, -1),
    jnp.repeat(keys_B, num_nodes, axis=0),
    index_BW.reshape(-1),
    sampling,
  )
  drawn_BW = drawn.reshape(batch_size, num_nodes)
  stop_tokens = jnp.asarray(sampling.stop_tokens, jnp.int32)
  ended_BW = jnp.isin(drawn_BW, stop_tokens)
  ended_BW |= index_BW + 1 >= sampling.max_new_tokens
  asked_BW = jnp.take_along_axis(drawn_BW, tree.parents_BW, 1)
  found_BW = (nodes_W < tree.num_nodes_B[:, None]) & (
    (nodes_W == 0) | (tree.tokens_BW == asked_BW)
  )
  # A node is reached if it and all above it were found and none above ended.
  above_BWW = tree_lib.ancestors(tree.parents_BW)
  passed_BWW = found_BW[:, None] & (
    ~ended_BW[:, None] | (nodes_W[:, None] == nodes_W)
  )
  reached_BW = (passed_BWW | ~above_BWW).all(-1)
  last_B1 = jnp.argmax(
    jnp.where(reached_BW, tree.depths_BW, -1), axis=1, keepdims=True
  )
  depth_B1 = jnp.take_along_axis(tree.depths_BW, last_B1, 1)
  on_path_BW = jnp.take_along_axis(above_BWW, last_B1[..., None], 1)[:, 0]
  levels_E = jnp.arange(depth + 1)
  is_node_BEW = on_path_BW[:, None] & (
    tree.depths_BW[:, None] == levels_E[:, None]
  )
  is_real_BE = levels_E <= depth_B1
  path_BE = jnp.where(is_real_BE, jnp.argmax(is_node_BEW, -1), last_B1)
  tokens_BE = jnp.take_along_axis(drawn_BW, path_BE, 1)
  log_probs_BE = jnp.take_along_axis(
    log_probs.reshape(batch_size, num_nodes), path_BE, 1
  )
  return Accepted(
    tokens_BE=jnp.where(is_real_BE, tokens_BE, 0),
    log_probs_BE=jnp.where(is_real_BE, log_probs_BE, 0.0),
    num_tokens_B=depth_B1[:, 0] + 1,
    path_BE=path_BE.astype(jnp.int32),
    ended_B=jnp.take_along_axis(ended_BW, last_B1, 1)[:, 0],
  )
