"""The union's chain: copied where that can be trusted, learned elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import decoding, presets, sampling, transformer
from efficient_llm.speculative import drafter as drafter_lib
from efficient_llm.speculative import drafting, model_draft, prefill
from efficient_llm.speculative import state as state_lib
from efficient_llm.speculative import tree as tree_lib
from efficient_llm.typing import Array

_CONFIG = presets.get('test', vocab_size=11, max_positions=64)
_SHAPE = tree_lib.DraftShape(3, 1, 4)
# The first says its own text again, the second nothing twice.
_PROMPTS = np.asarray(
  [[1, 2, 3, 4, 5, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
)


def _drafts(trusted_match: int) -> dict[str, Array]:
  params = transformer.init(_CONFIG, jax.random.key(0))
  both = {
    'learned': drafter_lib.init(_CONFIG, jax.random.key(1), params),
    'model_free': None,
  }
  union = drafting.union(_CONFIG, trusted_match=trusted_match)
  plan = state_lib.Plan(_CONFIG, sampling.SamplingConfig(8), union, 64)
  count = len(_PROMPTS)
  state = prefill.start(
    plan,
    False,
    decoding.prepare(_CONFIG, params),
    both,
    jnp.asarray(_PROMPTS, jnp.int32),
    jnp.full(count, _PROMPTS.shape[1], jnp.int32),
    sampling.row_keys(jax.random.key(2), count),
    None,
  )
  # Whatever was drawn, the first text is about to go on as it did before.
  newest = state.tokens_BS.at[:, _PROMPTS.shape[1]].set(jnp.asarray([5, 10]))
  state = dataclasses.replace(state, tokens_BS=newest)
  learned = model_draft.drafter(_CONFIG)
  draft_learned = learned.draft(
    both['learned'], params, state, _SHAPE, plan.sampling
  )
  return {
    'union': union.draft(both, params, state, _SHAPE, plan.sampling).tokens_BW,
    'learned': draft_learned.tokens_BW,
  }


def test_a_chain_is_copied_where_the_match_is_long_enough() -> None:
  drafts = _drafts(trusted_match=5)
  assert drafts['union'][0].tolist() == [5, 1, 2, 3]
  np.testing.assert_array_equal(drafts['union'][1], drafts['learned'][1])


@pytest.mark.parametrize('trusted_match', [6, 16])
def test_shorter_matches_leave_the_chain_to_the_draft_model(
  trusted_match: int,
) -> None:
  drafts = _drafts(trusted_match)
  np.testing.assert_array_equal(drafts['union'], drafts['learned'])
