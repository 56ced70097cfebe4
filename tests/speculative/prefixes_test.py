"""Rows with equal prompts share what was read of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import presets, sampling, transformer
from efficient_llm.speculative import (
  drafter,
  drafting,
  engine,
  prefixes,
  programs,
  strategy,
  strategy_config,
)
from efficient_llm.speculative import generation as generation_lib
from efficient_llm.speculative import state as state_lib

_CONFIG = presets.get('test', vocab_size=13, max_positions=64)
_SAMPLING = sampling.SamplingConfig(12, stop_tokens=(5,))
_KEY = jax.random.key(2)
_GROUPS = np.repeat([0, 1, 2], 3)
_PROMPTS = np.asarray([[1, 2, 3, 0], [4, 5, 0, 0], [1, 2, 0, 0]])[_GROUPS]
_LENGTHS = np.asarray([3, 2, 2])[_GROUPS]


@functools.lru_cache
def _params() -> Any:
  # Sharper than a fresh model, so that drafts are sometimes right.
  params = transformer.init(_CONFIG, jax.random.key(0))
  return jax.tree.map(lambda x: 2.0 * x if x.ndim > 1 else x, params)


def _engine(speculation: str, **options: Any) -> tuple[engine.Engine, Any]:
  learned = drafter.init(_CONFIG, jax.random.key(1), _params())
  made, draft_params = {
    'off': (None, None),
    'ngram': (drafting.model_free(), None),
    'union': (
      drafting.union(_CONFIG),
      {'learned': learned, 'model_free': None},
    ),
  }[speculation]
  chooser = strategy.Strategy(
    strategy_config.StrategyConfig(
      name='fixed', arms=('3_1_4',), thresholds=(1,)
    )
  )
  options = {'max_batch': 2, 'rounds_at_once': 2, **options}
  machine = engine.Engine(_CONFIG, drafter=made, chooser=chooser, **options)
  return machine, draft_params


def _generate(
  machine: engine.Engine, draft_params: Any, **options: Any
) -> generation_lib.Generation:
  return machine.generate(
    _params(),
    _PROMPTS,
    _LENGTHS,
    _SAMPLING,
    _KEY,
    draft_params=draft_params,
    groups_N=_GROUPS,
    **options,
  )


@functools.lru_cache
def _plain() -> sampling.Completion:
  """Every row's prompt read by itself."""
  return sampling.generate(
    _CONFIG,
    _params(),
    np.asarray(_PROMPTS, np.int32),
    np.asarray(_LENGTHS, np.int32),
    _SAMPLING,
    _KEY,
  )


@pytest.mark.parametrize(
  'speculation',
  ['off', 'ngram', pytest.param('union', marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(('max_kept', 'num_read'), [(3, 3), (0, None)])
def test_shared_prompts_change_nothing_that_is_drawn(
  speculation: str, max_kept: int, num_read: int | None
) -> None:
  machine, draft_params = _engine(speculation, max_kept_prompts=max_kept)
  found = _generate(machine, draft_params)
  np.testing.assert_array_equal(found.completion.tokens, _plain().tokens)
  np.testing.assert_array_equal(found.completion.lengths, _plain().lengths)
  np.testing.assert_allclose(
    found.completion.log_probs, _plain().log_probs, atol=1e-4
  )
  if num_read is not None:
    assert found.stats.num_prompts_read == num_read


def test_another_call_compiles_nothing() -> None:
  machine, draft_params = _engine('union', max_kept_prompts=3)
  first = _generate(machine, draft_params).stats
  assert first.compile_secs > 0
  assert _generate(machine, draft_params).stats.compile_secs == 0


def test_a_new_drafter_reads_the_prompts_again() -> None:
  machine, draft_params = _engine('union', max_kept_prompts=3)
  other = drafter.init(_CONFIG, jax.random.key(6), _params())
  newer = generation_lib.Refreshed(
    draft_params={**draft_params, 'learned': other}
  )
  found = _generate(machine, draft_params, refresh=lambda: newer)
  np.testing.assert_array_equal(found.completion.tokens, _plain().tokens)
  assert found.stats.num_prompts_read > 3


class _Table:
  """A table of places for prompts of one token each."""

  def __init__(self, num_prompts: int, max_kept: int) -> None:
    plan = state_lib.Plan(_CONFIG, _SAMPLING, None, 64)
    prompts = np.arange(num_prompts, dtype=np.int32)[:, None] % 13
    lengths = np.ones(num_prompts, np.int32)
    self.prefixes = prefixes.Prefixes(
      programs.Programs(), plan, prompts, lengths, max_kept=max_kept
    )

  def num_read(self, rows: list[int], waiting: list[int]) -> int:
    """Prompts that had to be read for these rows."""
    before = self.prefixes.num_read
    params = transformer.unstack_layers(_params())
    table, places = self.prefixes.hold(params, None, np.asarray(rows), waiting)
    assert len(table.logits_BV) == len(self.prefixes._held_R)
    whole, own = self.prefixes.hold(params, None, np.asarray(rows), [])
    assert whole is table
    assert own.tolist() == places.tolist()
    return self.prefixes.num_read - before


def test_memory_is_bounded_and_what_is_needed_soonest_stays() -> None:
  table = _Table(num_prompts=4, max_kept=2)
  assert table.num_read([0, 1], [2, 1, 0]) == 2
  # 2 takes the place of 0, which is asked for last.
  assert table.num_read([2], [1, 0]) == 1
  assert table.num_read([1], [0]) == 0
  assert table.num_read([0], []) == 1
  assert len(table.prefixes._held_R) == 2


def test_no_more_places_than_prompts_are_made() -> None:
  table = _Table(num_prompts=3, max_kept=32)
  assert table.num_read([0, 1, 2, 1], [2]) == 3
  assert len(table.prefixes._held_R) == 4


def test_the_place_of_a_prompt_holds_what_was_read_of_it() -> None:
  table = _Table(num_prompts=4, max_kept=2)
  params = transformer.unstack_layers(_params())
  for row in (0, 1, 2, 0, 3):
    held, places = table.prefixes.hold(params, None, np.asarray([row]), [])
    hidden = transformer.apply(
      _CONFIG, _params(), jnp.full((1, 1), row, jnp.int32)
    ).hidden
    expected = transformer.unembed(_CONFIG, _params(), hidden[0, 0])
    np.testing.assert_allclose(held.logits_BV[places[0]], expected, atol=1e-5)
