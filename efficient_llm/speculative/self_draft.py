"""The model as its own drafter, with rounded weights: a control.

It shows what a drafter can at most be worth: nearly every draft is accepted,
and every one costs a pass of the whole model.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm.models import decoding, kv_cache, transformer
from efficient_llm.models import sampling as sampling_lib
from efficient_llm.speculative import rejection, verify
from efficient_llm.speculative import state as state_lib
from efficient_llm.speculative import tree as tree_lib
from efficient_llm.typing import Array, Params


def quantize(params: Params, *, bits: int = 8) -> Params:
  """Rounds every matrix to whole multiples of a scale for each last index.

  The values come back as floats: what rounding does to the drafts is measured,
  not what integers would save.

  Args:
    params: Of a model.
    bits: Of each value, sign included, from 2 to 8.
  Raises:
    ValueError: If there are too many bits or too few.
  """
  if not 2 <= bits <= 8:
    raise ValueError(f'{bits=} must be from 2 to 8.')
  largest = 2 ** (bits - 1) - 1

  def rounded(x: Array) -> Array:
    if x.ndim < 2:
      return x
    scale = jnp.abs(x).max(tuple(range(x.ndim - 1)), keepdims=True) / largest
    return jnp.round(x / jnp.maximum(scale, 1e-30)) * scale

  return jax.tree.map(rounded, transformer.unstack_layers(params))


@functools.lru_cache(maxsize=8)
def drafter(config: transformer.TransformerConfig) -> state_lib.Drafter:
  """Chains of a model of the target's shape; its parameters are draft_params.

  Args:
    config: The target.
  """
  return state_lib.Drafter(
    read=functools.partial(_read, config),
    draft=functools.partial(_draft, config),
    observe=functools.partial(_observe, config),
    begin=_begin,
    resume=functools.partial(_resume, config),
    samples=True,
    prepare=functools.partial(decoding.prepare, config),
  )


def _draft(
  config: transformer.TransformerConfig,
  draft_params: Params,
  params: Params,
  state: state_lib.State,
  shape: tree_lib.DraftShape,
  sampling: sampling_lib.SamplingConfig,
) -> tree_lib.Tree:
  del params
  if shape.top_k != 1:
    raise ValueError(
      f'draft.top_k={shape.top_k} must be 1 where the model drafts for itself; '
      'choose chains, such as 4_1_5.'
    )
  pick = rejection.likeliest
  if shape.sampled:
    pick = rejection.drawn(state.keys_B, state.num_new_B, sampling)

  def step(carry: Any, level: Array) -> tuple[Any, Any]:
    cache, token_B = carry
    output = transformer.apply(
      config, draft_params, token_B[:, None], cache=cache, with_logits=False
    )
    logits_BV = transformer.unembed(config, draft_params, output.hidden[:, 0])
    token_B, law_BV = pick(logits_BV, level)
    return (output.cache, token_B), (token_B, law_BV)

  start = (state.memory, state.newest_B)
  _, picked = jax.lax.scan(step, start, jnp.arange(shape.depth))
  drafts_BD, laws_BDV = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), picked)
  tree = tree_lib.chain(state.newest_B, drafts_BD)
  return dataclasses.replace(tree, log_probs_BKV=laws_BDV)


def _read(
  config: transformer.TransformerConfig,
  draft_params: Params,
  params: Params,
  prompts_BP: Array,
  lengths_B: Array,
  hidden_BPD: Array,
) -> kv_cache.KVCache | None:
  del params, hidden_BPD
  batch_size, num_prompt = prompts_BP.shape
  return transformer.apply(
    config,
    draft_params,
    prompts_BP,
    cache=transformer.empty_cache(
      config, batch_size=batch_size, capacity=num_prompt
    ),
    num_new_B=lengths_B,
    with_logits=False,
  ).cache


def _begin(
  draft_params: Params,
  params: Params,
  memory: kv_cache.KVCache,
  token_B: Array,
  lengths_B: Array,
  *,
  capacity: int,
  is_off: bool,
) -> kv_cache.KVCache:
  """The newest token is read when a draft begins."""
  del draft_params, params, token_B, lengths_B, is_off
  return memory.widen(capacity)


def _observe(
  config: transformer.TransformerConfig,
  draft_params: Params,
  params: Params,
  before: state_lib.State,
  accepted: verify.Accepted,
  hidden_BED: Array,
  *,
  is_off: bool,
) -> kv_cache.KVCache | None:
  """Reads what now stands before the newest token."""
  del params, hidden_BED
  if is_off:
    return before.memory
  return transformer.apply(
    config,
    draft_params,
    jnp.concatenate([before.newest_B[:, None], accepted.tokens_BE[:, :-1]], 1),
    cache=before.memory,
    num_new_B=accepted.num_tokens_B,
    with_logits=False,
  ).cache


def _resume(
  config: transformer.TransformerConfig,
  draft_params: Params,
  params: Params,
  state: state_lib.State,
) -> kv_cache.KVCache | None:
  """Reads everything again: no kept feature stands for a whole model."""
  del params
  batch_size, capacity = state.tokens_BS.shape
  num_read = min(capacity, config.max_positions)
  return transformer.apply(
    config,
    draft_params,
    state.tokens_BS[:, :num_read],
    cache=transformer.empty_cache(
      config, batch_size=batch_size, capacity=capacity
    ),
    num_new_B=state.cache.lengths_B,
    with_logits=False,
  ).cache
