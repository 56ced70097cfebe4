"""What is decoded: the batch, how it is drafted for, and what is compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm.models import kv_cache, transformer
from efficient_llm.models import sampling as sampling_lib
from efficient_llm.speculative import tree as tree_lib
from efficient_llm.speculative import verify
from efficient_llm.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """A batch that is being completed.

  Every leaf has the rows of the batch in front, so rows are dropped, repeated
  and joined with one indexing of the whole tree.

  Attributes:
    cache: The target's, for every token but the newest.
    tokens_BS: Prompt and completion.
    lengths_B: Tokens of each row, the newest included.
    log_probs_BS: Of each new token under the law it was drawn from, at its
      place in `tokens_BS`.
    num_new_B: Tokens of the completion, those of an earlier call included.
    num_passes_B: Target passes while the row was live.
    ended_B: Rows that are complete.
    keys_B: From `sampling.row_keys`.
    groups_B: Rows of one group may draft from each other; None keeps all
      apart.
    memory: What the drafter keeps; leaves have the rows in front.
  """

  cache: kv_cache.KVCache
  tokens_BS: Array
  lengths_B: Array
  log_probs_BS: Array
  num_new_B: Array
  num_passes_B: Array
  ended_B: Array
  keys_B: Array
  groups_B: Array | None
  memory: Any

  @property
  def newest_B(self) -> Array:
    """The newest token of each row, which becomes the root of its tree."""
    last_B1 = self.lengths_B[:, None] - 1
    return jnp.take_along_axis(self.tokens_BS, last_B1, 1)[:, 0]

  def take(self, rows: Array) -> 'State':
    """Keeps, repeats or reorders rows."""
    return jax.tree.map(lambda x: x[rows], self)


@dataclasses.dataclass(frozen=True)
class Drafter:
  """How tokens are drafted, as functions of arrays.

  But for `rejection.drawn` a drafter must not look at the keys of the rows:
  then what it drafts changes the speed and nothing else.

  Attributes:
    read: (draft_params, params, prompts_BP, lengths_B, hidden_BPD) -> memory of
      prompts alone, no wider than these.
    draft: (draft_params, params, state, shape, sampling) -> Tree of
      `shape.num_nodes`.
    observe: (draft_params, params, before, accepted, hidden_BED, is_off=) ->
      memory, after every round; `before` is the state of the round's start,
      hidden_BED the target's hidden states along the accepted path. While
      speculation is off or copies it keeps only what costs nothing.
    begin: (draft_params, params, memory, token_B, lengths_B, capacity=,
      is_off=) -> memory of rows with this capacity, from that of their prompts
      and their first tokens; lengths_B are the prompts'.
    resume: (draft_params, params, state) -> memory, before the first round
      with a draft model after others, or with other draft_params.
    copies: Whether it can draft `DraftShape.copied` shapes.
    samples: Whether it can draft `DraftShape.sampled` shapes.
    prepare: (draft_params) -> draft_params in the form that is fastest to
      read, once for each; None where there is none.
    with_texts: (draft_params, texts) -> draft_params that copy from these
      texts too, keywords of `ngram.draft`; None where it does not copy.
  """

  read: Callable[..., Any]
  draft: Callable[..., tree_lib.Tree]
  observe: Callable[..., Any]
  begin: Callable[..., Any]
  resume: Callable[..., Any]
  copies: bool = False
  samples: bool = False
  prepare: Callable[..., Any] | None = None
  with_texts: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a compiled program depends on, besides the shapes of its arrays.

  Attributes:
    capacity: Tokens of a row: prompt, completion and one round's tree.
    draw: As for `verify.accept`.
  """

  model: transformer.TransformerConfig
  sampling: sampling_lib.SamplingConfig
  drafter: Drafter | None
  capacity: int
  draw: verify.Draw = sampling_lib.draw


def put(rows_of: Any, rows: Array, others: Any) -> Any:
  """Replaces rows of a tree; ids behind the last row are left out."""
  return jax.tree.map(
    lambda x, y: x.at[rows].set(y, mode='drop'), rows_of, others
  )


def write(
  buffer_BS: Array, new_BE: Array, starts_B: Array, num_B: Array
) -> Array:
  """Writes the first `num` entries of each row behind its start.

  Args:
    buffer_BS: What is written to; may have further axes. It has room for all
      new entries of rows that have some.
    new_BE: New entries.
    starts_B: Where each row's entries go.
    num_B: How many of them count.
  """
  num_entries = new_BE.shape[1]

  def write_row(row_S: Array, new_E: Array, start: Array, num: Array) -> Array:
    old_E = jax.lax.dynamic_slice_in_dim(row_S, start, num_entries)
    counts_E = (jnp.arange(num_entries) < num).reshape(
      -1, *[1] * (new_E.ndim - 1)
    )
    new_E = jnp.where(counts_E, new_E.astype(row_S.dtype), old_E)
    return jax.lax.dynamic_update_slice_in_dim(row_S, new_E, start, axis=0)

  return jax.vmap(write_row)(buffer_BS, new_BE, starts_B, num_B)
