"""The one-layer draft model in the engine: what it keeps, drafts and reads."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm.models import kv_cache, transformer
from efficient_llm.speculative import drafter as drafter_lib
from efficient_llm.speculative import expansion, rejection, verify
from efficient_llm.speculative import state as state_lib
from efficient_llm.speculative import tree as tree_lib
from efficient_llm.typing import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
  """What the learned drafter keeps of a row.

  Attributes:
    cache: Its keys and values of the pairs (hidden state t, token t + 1).
    hidden_BSD: The target's hidden states, from which the cache can be made
      again by matrix products.
    feature_BD: Its prediction at the last pair: the root's children come from
      it.
  """

  cache: kv_cache.KVCache
  hidden_BSD: Array
  feature_BD: Array


@functools.lru_cache(maxsize=8)
def drafter(config: transformer.TransformerConfig) -> state_lib.Drafter:
  """The one-layer draft model; draft_params are those of `drafter.init`.

  Args:
    config: The target.
  """
  return state_lib.Drafter(
    read=functools.partial(_read, config),
    draft=functools.partial(_draft_learned, config),
    observe=functools.partial(_observe, config),
    begin=functools.partial(_begin, config),
    resume=functools.partial(_resume, config),
    samples=True,
    prepare=functools.partial(drafter_lib.prepare, config),
  )


def _read(
  config: transformer.TransformerConfig,
  draft_params: Params,
  params: Params,
  prompts_BP: Array,
  lengths_B: Array,
  hidden_BPD: Array,
) -> Memory:
  """Reads the pairs that do not need the first new token."""
  batch_size, num_prompt = prompts_BP.shape
  _, cache = expansion.forward(
    config,
    draft_params,
    params,
    jnp.roll(prompts_BP, -1, axis=1),
    hidden_BPD,
    drafter_lib.empty_cache(config, batch_size, num_prompt),
    num_new_B=lengths_B - 1,
  )
  return Memory(cache, hidden_BPD, jnp.zeros_like(hidden_BPD[:, 0]))


def _begin(
  config: transformer.TransformerConfig,
  draft_params: Params,
  params: Params,
  memory: Memory,
  token_B: Array,
  lengths_B: Array,
  *,
  capacity: int,
  is_off: bool,
) -> Memory:
  """Reads the last pair, which is the first new token's."""
  cache = memory.cache.widen(capacity)
  room = ((0, 0), (0, capacity - memory.hidden_BSD.shape[1]), (0, 0))
  hidden_BSD = jnp.pad(memory.hidden_BSD, room)
  if is_off:
    return Memory(cache, hidden_BSD, memory.feature_BD)
  features, cache = expansion.forward(
    config,
    draft_params,
    params,
    token_B[:, None],
    _at(memory.hidden_BSD, lengths_B - 1)[:, None],
    cache,
  )
  return Memory(cache, hidden_BSD, features[:, 0])


def _observe(
  config: transformer.TransformerConfig,
  draft_params: Params,
  params: Params,
  before: state_lib.State,
  accepted: verify.Accepted,
  hidden_BED: Array,
  *,
  is_off: bool,
) -> Memory:
  """Reads the pairs of the accepted tokens, with the target's own states."""
  memory = before.memory
  num_B = accepted.num_tokens_B
  hidden_BSD = state_lib.write(
    memory.hidden_BSD, hidden_BED, before.cache.lengths_B, num_B
  )
  if is_off:
    return dataclasses.replace(memory, hidden_BSD=hidden_BSD)
  features, cache = expansion.forward(
    config,
    draft_params,
    params,
    accepted.tokens_BE,
    hidden_BED,
    memory.cache,
    num_new_B=num_B,
  )
  feature_BD = jnp.where(
    num_B[:, None] > 0, _at(features, num_B - 1), memory.feature_BD
  )
  return Memory(cache, hidden_BSD, feature_BD)


def _resume(
  config: transformer.TransformerConfig,
  draft_params: Params,
  params: Params,
  state: state_lib.State,
) -> Memory:
  """All pairs but the last by matrix products, the last by a step."""
  memory, num_pairs_B = state.memory, state.cache.lengths_B
  next_tokens_BS = jnp.roll(state.tokens_BS, -1, axis=1)
  cache = drafter_lib.rebuild_cache(
    config,
    draft_params,
    params,
    next_tokens_BS,
    memory.hidden_BSD,
    num_pairs_B - 1,
  )
  features, cache = expansion.forward(
    config,
    draft_params,
    params,
    jnp.take_along_axis(next_tokens_BS, num_pairs_B[:, None] - 1, 1),
    _at(memory.hidden_BSD, num_pairs_B - 1)[:, None],
    cache,
    num_new_B=jnp.ones_like(num_pairs_B),
  )
  return Memory(cache, memory.hidden_BSD, features[:, 0])


def _draft_learned(
  config: transformer.TransformerConfig,
  draft_params: Params,
  params: Params,
  state: state_lib.State,
  shape: tree_lib.DraftShape,
  sampling: Any,
) -> tree_lib.Tree:
  widen = expansion.chain if shape.top_k == 1 else expansion.tree
  if shape.sampled:
    pick = rejection.drawn(state.keys_B, state.num_new_B, sampling)
    widen = functools.partial(expansion.chain, pick=pick)
  if shape.early:
    widen = functools.partial(expansion.early_chain, live_B=~state.ended_B)
  memory = state.memory
  return widen(
    config,
    draft_params,
    params,
    memory.cache,
    memory.feature_BD,
    state.newest_B,
    shape,
  )


def _at(x_BT: Array, index_B: Array) -> Array:
  """One entry of each row; an index below 0 is taken as 0."""
  index_B = jnp.maximum(index_B, 0)
  shape = (-1, 1) + (1,) * (x_BT.ndim - 2)
  return jnp.take_along_axis(x_BT, index_B.reshape(shape), axis=1)[:, 0]
