"""Sampled chains: drafts drawn from the drafter's own law, then rejection.

At a high temperature the likeliest token is often not the one that is drawn; a
draft that is itself drawn at random is accepted with 1 - TV(target, drafter).
Every token has the target's law, but it is not the one that plain decoding
draws with the same key: the coins of drafts, of acceptance and of the token
behind them are apart from each other and from those of `models.sampling`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from efficient_llm.kernels.speculative_sampling import api
from efficient_llm.models import sampling as sampling_lib
from efficient_llm.speculative import tree as tree_lib
from efficient_llm.speculative import verify
from efficient_llm.typing import Array, Float, Int, typed

# (logits_BV, level) -> (token_B, log_probs_BV): how a chain's next token is
# drafted, and the law it was drawn from, None where it was not drawn.
Pick = Callable[[Array, Array | int], tuple[Array, Array | None]]

# Larger than the number of any token, whose coins have the numbers before.
_DRAFT, _COIN, _BEHIND = 2**32 - 1, 2**32 - 2, 2**32 - 3


def likeliest(
  logits_BV: Array, level: Array | int
) -> tuple[Array, Array | None]:
  """Picks without coins."""
  del level
  return jnp.argmax(logits_BV, -1).astype(jnp.int32), None


def drawn(
  keys_B: Array, index_B: Array, sampling: sampling_lib.SamplingConfig
) -> Pick:
  """Picks at random, with the same temperature and truncation as the target.

  Args:
    keys_B: From `sampling.row_keys`.
    index_B: Number of the chain's first draft in its completion.
    sampling: How to draw.
  """
  keys_B = _fold(keys_B, _DRAFT)

  def pick(logits_BV: Array, level: Array | int) -> tuple[Array, Array | None]:
    log_probs_BV = sampling_lib.truncate(logits_BV, sampling)
    step_keys_B = jax.vmap(jax.random.fold_in)(keys_B, index_B + level)
    token_B = jax.vmap(jax.random.categorical)(step_keys_B, log_probs_BV)
    return token_B.astype(jnp.int32), log_probs_BV

  return pick


def certain(tokens_BK: Array, vocab_size: int) -> Array:
  """The law of drafts that were not drawn: all mass is on each."""
  is_it_BKV = tokens_BK[..., None] == jnp.arange(vocab_size)
  return jnp.where(is_it_BKV, 0.0, -jnp.inf)


@typed
def accept(
  tree: tree_lib.Tree,
  logits_BWV: Float[Array, 'B W V'],
  keys_B: Array,
  index_B: Int[Array, 'B'],
  sampling: sampling_lib.SamplingConfig,
) -> verify.Accepted:
  """Accepts a chain as far as its coins allow, and draws the token behind.

  Args:
    tree: A chain with `log_probs_BKV`.
    logits_BWV: The target's logits at every node.
    keys_B: From `sampling.row_keys`.
    index_B: Number of the first new token in its completion.
    sampling: How to draw, when to stop, and the longest completion.
  Source: Leviathan et al. 2023, Algorithm 1, arXiv:2211.17192.
  """
  assert tree.log_probs_BKV is not None
  num_nodes = tree.tokens_BW.shape[1]
  nodes_W = jnp.arange(num_nodes, dtype=jnp.int32)
  log_probs_BWV = sampling_lib.truncate(logits_BWV, sampling)
  # Padding is no draft.
  is_draft_BK = nodes_W[1:] < tree.num_nodes_B[:, None]
  drafts_BK = jnp.where(is_draft_BK, tree.tokens_BW[:, 1:], -1)
  # Which coins a draft has depends on its number alone: those behind the first
  # rejection decided nothing, and are tossed again in the next round.
  toss = jax.vmap(jax.vmap(_uniform, (None, 0)))
  coins_BK = toss(_fold(keys_B, _COIN), index_B[:, None] + nodes_W[:-1])
  behind_B = jax.vmap(jax.random.fold_in)(_fold(keys_B, _BEHIND), index_B)
  num_accepted_B, token_B = api.reject_chain(
    log_probs_BWV,
    tree.log_probs_BKV,
    drafts_BK,
    coins_BK,
    jax.vmap(lambda key: jax.random.bits(key, (2,)))(behind_B),
  )
  accepted_B1 = num_accepted_B[:, None]
  tokens_BW = jnp.pad(drafts_BK, ((0, 0), (0, 1)))
  tokens_BW = jnp.where(nodes_W == accepted_B1, token_B[:, None], tokens_BW)
  stop_tokens = jnp.asarray(sampling.stop_tokens, jnp.int32)
  ended_BW = jnp.isin(tokens_BW, stop_tokens)
  ended_BW |= index_B[:, None] + nodes_W + 1 >= sampling.max_new_tokens
  # The first that ends the row, or the last there is.
  is_last_BW = ended_BW | (nodes_W == accepted_B1)
  last_B1 = jnp.argmax(is_last_BW, 1).astype(jnp.int32)[:, None]
  is_real_BW = nodes_W <= last_B1
  log_probs_BW = jnp.take_along_axis(
    log_probs_BWV, jnp.maximum(tokens_BW, 0)[..., None], -1
  )[..., 0]
  return verify.Accepted(
    tokens_BE=jnp.where(is_real_BW, tokens_BW, 0),
    log_probs_BE=jnp.where(is_real_BW, log_probs_BW, 0.0),
    num_tokens_B=last_B1[:, 0] + 1,
    path_BE=jnp.minimum(nodes_W, last_B1),
    ended_B=jnp.take_along_axis(ended_BW, last_B1, 1)[:, 0],
  )


def _fold(keys_B: Array, role: int) -> Array:
  return jax.vmap(lambda key: jax.random.fold_in(key, jnp.uint32(role)))(keys_B)


def _uniform(key: Array, index: Array) -> Array:
  return jax.random.uniform(jax.random.fold_in(key, index))
