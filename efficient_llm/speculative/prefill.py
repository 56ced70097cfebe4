"""Prefill in two halves: what rows share of a prompt, and how each begins.

The target reads a prompt once; every row that completes it copies what was
read and draws its own first token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm.models import kv_cache, transformer
from efficient_llm.speculative import state as state_lib
from efficient_llm.typing import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
  """Prompts that have been read; every leaf has them in front.

  Attributes:
    cache: The target's, with no more room than the prompts' width.
    logits_BV: What a first token is drawn from.
    memory: What the drafter keeps of the prompts.
  """

  cache: kv_cache.KVCache
  logits_BV: Array
  memory: Any


def read(
  plan: state_lib.Plan,
  params: Params,
  draft_params: Params | None,
  prompts_BP: Array,
  prompt_lengths_B: Array,
) -> Prefix:
  """Runs the target, and the draft model if there is one, over prompts.

  Args:
    plan: What is decoded and how.
    params: The target's, from `decoding.prepare`.
    draft_params: The drafter's, prepared as it wants them.
    prompts_BP: Padded on the right.
    prompt_lengths_B: Real tokens, at least one.
  """
  batch_size, num_prompt = prompts_BP.shape
  output = transformer.apply(
    plan.model,
    params,
    prompts_BP,
    cache=transformer.empty_cache(
      plan.model, batch_size=batch_size, capacity=num_prompt
    ),
    num_new_B=prompt_lengths_B,
    with_logits=False,
  )
  last_B11 = (prompt_lengths_B - 1)[:, None, None]
  hidden_BD = jnp.take_along_axis(output.hidden, last_B11, axis=1)[:, 0]
  memory = None
  if plan.drafter is not None:
    memory = plan.drafter.read(
      draft_params, params, prompts_BP, prompt_lengths_B, output.hidden
    )
  assert output.cache is not None
  logits_BV = transformer.unembed(plan.model, params, hidden_BD)
  return Prefix(output.cache, logits_BV, memory)


def begin(
  plan: state_lib.Plan,
  is_off: bool,
  params: Params,
  draft_params: Params | None,
  prefix: Prefix,
  prompts_BP: Array,
  prompt_lengths_B: Array,
  keys_B: Array,
  groups_B: Array | None,
  num_drawn_B: Array,
) -> state_lib.State:
  """Draws the next token of each row, the first behind what was read.

  Args:
    plan: What is decoded and how.
    is_off: Whether rounds without a draft model come next.
    params: The target's, from `decoding.prepare`.
    draft_params: The drafter's, prepared as it wants them.
    prefix: Of the same prompts, row by row.
    prompts_BP: Padded on the right.
    prompt_lengths_B: Real tokens, at least one.
    keys_B: From `sampling.row_keys`.
    groups_B: Group of each row, or None.
    num_drawn_B: Tokens at the end of what was read that are the completion's.
  """
  batch_size, num_prompt = prompts_BP.shape
  token_B, log_prob_B = plan.draw(
    prefix.logits_BV, keys_B, num_drawn_B, plan.sampling
  )
  tokens_BS = jnp.zeros((batch_size, plan.capacity), jnp.int32)
  tokens_BS = tokens_BS.at[:, :num_prompt].set(prompts_BP)
  rows_B = jnp.arange(batch_size)
  tokens_BS = tokens_BS.at[rows_B, prompt_lengths_B].set(token_B)
  stop_tokens = jnp.asarray(plan.sampling.stop_tokens, jnp.int32)
  log_probs_BS = jnp.zeros(tokens_BS.shape)
  memory = None
  if plan.drafter is not None:
    memory = plan.drafter.begin(
      draft_params,
      params,
      prefix.memory,
      token_B,
      prompt_lengths_B,
      capacity=plan.capacity,
      is_off=is_off,
    )
  return state_lib.State(
    cache=prefix.cache.widen(plan.capacity),
    tokens_BS=tokens_BS,
    lengths_B=prompt_lengths_B + 1,
    log_probs_BS=log_probs_BS.at[rows_B, prompt_lengths_B].set(log_prob_B),
    num_new_B=num_drawn_B + 1,
    num_passes_B=jnp.zeros(batch_size, jnp.int32),
    ended_B=jnp.isin(token_B, stop_tokens)
    | (num_drawn_B + 1 >= plan.sampling.max_new_tokens),
    keys_B=keys_B,
    groups_B=groups_B,
    memory=memory,
  )


def start(
  plan: state_lib.Plan,
  is_off: bool,
  params: Params,
  draft_params: Params | None,
  prompts_BP: Array,
  prompt_lengths_B: Array,
  keys_B: Array,
  groups_B: Array | None,
) -> state_lib.State:
  """Reads a prompt for each row and begins it; arguments as above."""
  prefix = read(plan, params, draft_params, prompts_BP, prompt_lengths_B)
  return begin(
    plan,
    is_off,
    params,
    draft_params,
    prefix,
    prompts_BP,
    prompt_lengths_B,
    keys_B,
    groups_B,
    jnp.zeros_like(prompt_lengths_B),
  )
