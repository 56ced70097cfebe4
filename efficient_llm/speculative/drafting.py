"""Drafts that are copied from text, alone or beside a draft model's."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm.models import transformer
from efficient_llm.speculative import drafter as drafter_lib
from efficient_llm.speculative import model_draft, ngram, rejection
from efficient_llm.speculative import state as state_lib
from efficient_llm.speculative import tree as tree_lib
from efficient_llm.typing import Params


@functools.lru_cache(maxsize=8)
def model_free(max_match: int = 16) -> state_lib.Drafter:
  """Copies what followed the same text before; it has no memory of its own.

  draft_params may hold finished answers as keywords of `ngram.draft`.

  Args:
    max_match: Longest text compared.
  """

  def draft(
    draft_params: Any,
    params: Params,
    state: state_lib.State,
    shape: tree_lib.DraftShape,
    sampling: Any,
  ) -> tree_lib.Tree:
    del params, sampling
    return _copy(draft_params, state, shape, max_match).tree

  def nothing(*arguments: Any, **more: Any) -> None:
    del arguments, more

  return state_lib.Drafter(
    nothing,
    draft,
    nothing,
    nothing,
    nothing,
    copies=True,
    with_texts=lambda _, texts: texts,
  )


def _copy(
  draft_params: Any,
  state: state_lib.State,
  shape: tree_lib.DraftShape,
  max_match: int,
) -> ngram.Draft:
  return ngram.draft(
    state.tokens_BS,
    state.lengths_B,
    shape=shape,
    group_ids_B=state.groups_B,
    max_match=max_match,
    **(draft_params or {}),
  )


@functools.lru_cache(maxsize=8)
def union(
  config: transformer.TransformerConfig,
  max_match: int = 16,
  trusted_match: int = 12,
) -> state_lib.Drafter:
  """The learned tree and one copied path under one budget.

  draft_params are {'learned': …, 'model_free': …}. The learned tree leaves room
  for a path; where both say the same, the room stays empty. A chain has no room
  for both: it is copied where long enough a text was there before, and the
  draft model does not run at all where that holds for every live row.

  Args:
    config: The target.
    max_match: Longest text compared.
    trusted_match: From so many matching tokens on a chain is copied.
  """
  one, other = model_draft.drafter(config), model_free(max_match)

  def draft_chain(copied: ngram.Draft, *arguments: Any) -> tree_lib.Tree:
    *_, state, shape, _ = arguments
    copied_tree = copied.tree
    if shape.sampled:
      law = rejection.certain(copied_tree.tokens_BW[:, 1:], config.vocab_size)
      copied_tree = dataclasses.replace(copied_tree, log_probs_BKV=law)
    is_copied_B = copied.match_lengths_B >= trusted_match
    learned_tree = jax.lax.cond(
      (is_copied_B | state.ended_B).all(),
      lambda: copied_tree,
      lambda: one.draft(*arguments),
    )
    return jax.tree.map(
      lambda x, y: jnp.where(
        is_copied_B.reshape(-1, *[1] * (x.ndim - 1)), x, y
      ),
      copied_tree,
      learned_tree,
    )

  def draft(
    draft_params: Any,
    params: Params,
    state: state_lib.State,
    shape: tree_lib.DraftShape,
    sampling: Any,
  ) -> tree_lib.Tree:
    if shape.copied or shape.top_k == 1:
      copied = _copy(draft_params['model_free'], state, shape, max_match)
      if shape.copied:
        return copied.tree
      learned_params = draft_params['learned']
      return draft_chain(copied, learned_params, params, state, shape, sampling)
    depth = shape.depth
    room = max(depth + 1, shape.num_nodes - depth)
    smaller = dataclasses.replace(shape, num_nodes=room)
    path = tree_lib.DraftShape(depth, 1, depth + 1)
    return tree_lib.merge(
      one.draft(draft_params['learned'], params, state, smaller, sampling),
      other.draft(draft_params['model_free'], params, state, path, sampling),
      num_nodes=shape.num_nodes,
    )

  def with_learned(function: Any) -> Any:
    return lambda draft_params, *rest, **more: function(
      draft_params['learned'], *rest, **more
    )

  def prepare(draft_params: Any) -> Any:
    learned_params = drafter_lib.prepare(config, draft_params['learned'])
    return {**draft_params, 'learned': learned_params}

  return state_lib.Drafter(
    with_learned(one.read),
    draft,
    with_learned(one.observe),
    with_learned(one.begin),
    with_learned(one.resume),
    copies=True,
    samples=True,
    prepare=prepare,
    with_texts=lambda draft_params, texts: {
      **draft_params,
      'model_free': texts,
    },
  )
