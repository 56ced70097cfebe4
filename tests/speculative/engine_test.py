"""Whatever is drafted, a row says what plain decoding says.

Over 300 lines: the drafters it is tried with are written here.
"""

import functools
import itertools
import threading
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
  expansion,
  model_draft,
  prefill,
  rounds,
  row_queue,
  self_draft,
  strategy,
  strategy_config,
)
from efficient_llm.speculative import generation as generation_lib
from efficient_llm.speculative import state as state_lib
from efficient_llm.speculative import tree as tree_lib

_CONFIG = presets.get('test', vocab_size=13, max_positions=128)
_SHAPES = {
  'chain': tree_lib.DraftShape(3, 1, 4),
  'tree': tree_lib.DraftShape(3, 2, 6),
  'early': tree_lib.DraftShape(3, 1, 4, early=True),
}
_SAMPLINGS = {
  'greedy': sampling.SamplingConfig(24, temperature=0.0),
  'sampled': sampling.SamplingConfig(24, temperature=0.8),
  'truncated': sampling.SamplingConfig(24, top_k=6, top_p=0.9),
  'stopped': sampling.SamplingConfig(24, stop_tokens=(3, 5)),
}
_KEY = jax.random.key(7)


def _fixed(shape: tree_lib.DraftShape) -> strategy.Strategy:
  return strategy.Strategy(
    strategy_config.StrategyConfig(
      name='fixed', arms=(shape.name,), thresholds=(1,)
    )
  )


@functools.lru_cache
def _params() -> Any:
  # Sharper than a fresh model, so that drafts are sometimes right.
  params = transformer.init(_CONFIG, jax.random.key(0))
  return jax.tree.map(lambda x: 2.0 * x if x.ndim > 1 else x, params)


@functools.lru_cache
def _prompts() -> tuple[np.ndarray, np.ndarray]:
  tokens = jax.random.randint(jax.random.key(1), (5, 9), 0, 13)
  return np.asarray(tokens, np.int32), np.asarray([9, 1, 4, 7, 2], np.int32)


@functools.lru_cache
def _plain(name: str) -> sampling.Completion:
  tokens, lengths = _prompts()
  return sampling.generate(
    _CONFIG, _params(), tokens, lengths, _SAMPLINGS[name], _KEY
  )


def _guesses(kind: str) -> state_lib.Drafter:
  """A drafter that proposes what it likes."""

  def draft(draft_params, params, state, shape, sampling):
    del draft_params, params, sampling
    batch_size = state.tokens_BS.shape[0]
    num_candidates = 4 * shape.num_nodes
    key = jax.random.fold_in(jax.random.key(3), state.lengths_B.sum())
    tokens = jax.random.randint(key, (batch_size, num_candidates), 0, 13)
    if kind == 'constant':
      tokens = jnp.full_like(tokens, 4)
    index = jnp.arange(num_candidates)
    parents = jnp.broadcast_to(index // shape.top_k - 1, tokens.shape)
    if shape.top_k == 1:
      parents = jnp.broadcast_to(index - 1, tokens.shape)
    depths = jnp.floor(jnp.log2(index + 2.0))
    scores = -index * 1.0
    if kind == 'not_a_number':
      scores = jnp.full_like(scores, jnp.nan)
    deep = (index if shape.top_k == 1 else depths - 1) >= shape.depth
    scores = jnp.where(deep, -jnp.inf, scores)
    root = jnp.take_along_axis(state.tokens_BS, state.lengths_B[:, None] - 1, 1)
    return tree_lib.select(
      root[:, 0],
      tokens.astype(jnp.int32),
      parents.astype(jnp.int32),
      jnp.broadcast_to(scores, tokens.shape),
      num_nodes=shape.num_nodes,
    )

  def nothing(*arguments, **more):
    del arguments, more

  return state_lib.Drafter(nothing, draft, nothing, nothing, nothing)


@functools.lru_cache
def _drafter_of(kind: str) -> tuple[state_lib.Drafter, Any]:
  if kind == 'model_free':
    return drafting.model_free(), None
  params = drafter.init(_CONFIG, jax.random.key(5), _params())
  if kind == 'broken':
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
  if kind == 'itself':
    return self_draft.drafter(_CONFIG), self_draft.quantize(_params())
  if kind in ('learned', 'broken'):
    return model_draft.drafter(_CONFIG), params
  if kind == 'union':
    both = {'learned': params, 'model_free': None}
    return drafting.union(_CONFIG), both
  return _guesses(kind), None


def _generate(
  kind: str, chooser: strategy.Strategy, name: str, **options: Any
) -> sampling.Completion:
  """What the engine says, with groups so that rows draft from each other."""
  plan, draft_params = _drafter_of(kind)
  tokens, lengths = _prompts()
  machine = engine.Engine(_CONFIG, drafter=plan, chooser=chooser, **options)
  return machine.generate(
    _params(),
    tokens,
    lengths,
    _SAMPLINGS[name],
    _KEY,
    draft_params=draft_params,
    groups_N=np.asarray([0, 0, 1, 1, 1]),
  ).completion


def _assert_same(ours: sampling.Completion, plain: sampling.Completion) -> None:
  np.testing.assert_array_equal(ours.lengths, plain.lengths)
  np.testing.assert_array_equal(ours.tokens, plain.tokens)
  # One pass over several tokens adds up in another order.
  np.testing.assert_allclose(ours.log_probs, plain.log_probs, atol=1e-4)


_CASES = list(
  itertools.product(('model_free', 'learned', 'random'), _SHAPES, _SAMPLINGS)
)
# Every drafter, shape and way of drawing is in one of these.
_QUICK = {
  ('model_free', 'chain', 'greedy'),
  ('model_free', 'tree', 'truncated'),
  ('learned', 'chain', 'stopped'),
  ('learned', 'early', 'greedy'),
  ('random', 'tree', 'greedy'),
}


@pytest.mark.parametrize(
  ('kind', 'shape', 'name'),
  [
    pytest.param(*case, marks=[] if case in _QUICK else pytest.mark.slow)
    for case in _CASES
  ],
)
def test_speculation_says_what_plain_decoding_says(
  kind: str, shape: str, name: str
) -> None:
  found = _generate(kind, _fixed(_SHAPES[shape]), name)
  _assert_same(found, _plain(name))


@pytest.mark.parametrize(
  'kind',
  [
    'constant',
    'not_a_number',
    'broken',
    pytest.param('union', marks=pytest.mark.slow),
  ],
)
def test_a_useless_drafter_changes_nothing_but_the_speed(kind: str) -> None:
  found = _generate(kind, _fixed(_SHAPES['tree']), 'sampled')
  _assert_same(found, _plain('sampled'))


@pytest.mark.parametrize(('least', 'is_empty'), [(0.0, False), (1.1, True)])
def test_an_early_chain_ends_where_the_draft_model_doubts(
  least: float, is_empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(expansion, '_MIN_PROB', max(least, 1e-30))
  state = _begun()
  plan, draft_params = _drafter_of('learned')

  def draft(name: str) -> tree_lib.Tree:
    shape, sampling_config = _SHAPES[name], _SAMPLINGS['greedy']
    return plan.draft(draft_params, _params(), state, shape, sampling_config)

  found, whole = draft('early'), draft('chain')
  if is_empty:
    assert found.num_nodes_B.tolist() == [1] * 5
  else:
    np.testing.assert_array_equal(found.tokens_BW, whole.tokens_BW)
    assert found.num_nodes_B.tolist() == [4] * 5


def _begun() -> state_lib.State:
  """A batch whose prompts were read."""
  plan, draft_params = _drafter_of('learned')
  tokens, lengths = _prompts()
  return prefill.start(
    state_lib.Plan(_CONFIG, _SAMPLINGS['greedy'], plan, 40),
    False,
    _params(),
    draft_params,
    jnp.asarray(tokens),
    jnp.asarray(lengths),
    sampling.row_keys(_KEY, 5),
    None,
  )


def test_prompts_that_wait_join_and_say_the_same() -> None:
  chooser = _fixed(_SHAPES['chain'])
  found = _generate(
    'learned', chooser, 'stopped', max_batch=2, rounds_at_once=3
  )
  _assert_same(found, _plain('stopped'))


@pytest.mark.slow
def test_the_rounded_model_is_nearly_always_right() -> None:
  plan, draft_params = _drafter_of('itself')
  tokens, lengths = _prompts()
  chooser = _fixed(_SHAPES['chain'])
  machine = engine.Engine(_CONFIG, drafter=plan, chooser=chooser)
  generation = machine.generate(
    _params(),
    tokens,
    lengths,
    _SAMPLINGS['greedy'],
    _KEY,
    draft_params=draft_params,
  )
  _assert_same(generation.completion, _plain('greedy'))
  depth = _SHAPES['chain'].depth
  assert generation.stats.acceptance_length > 0.8 * (depth + 1)


def test_the_rounded_model_goes_on_and_off_without_a_trace() -> None:
  arms = strategy_config.StrategyConfig(arms=('2_1_3+3_1_4',), thresholds=(1,))
  found = _generate('itself', _InTurn(arms), 'sampled', rounds_at_once=2)
  _assert_same(found, _plain('sampled'))


class _InTurn(strategy.Strategy):
  """Off, on, off, on: a strategy that keeps changing its mind."""

  def __init__(self, config: strategy_config.StrategyConfig) -> None:
    super().__init__(config)
    self.count = 0

  def choose(self, batch_size: int) -> tree_lib.DraftShape:
    self.count += 1
    return self.arms(batch_size)[self.count % 3]


def test_speculation_goes_on_and_off_without_a_trace() -> None:
  arms = strategy_config.StrategyConfig(arms=('3_1_4+3_2_6',), thresholds=(1,))
  found = _generate('learned', _InTurn(arms), 'sampled', rounds_at_once=2)
  _assert_same(found, _plain('sampled'))


def test_a_draft_model_rests_while_text_is_copied() -> None:
  arms = strategy_config.StrategyConfig(arms=('3_1_4c+3_2_6',), thresholds=(1,))
  found = _generate('union', _InTurn(arms), 'sampled', rounds_at_once=2)
  _assert_same(found, _plain('sampled'))


def _refreshing(
  kind: str, refreshed: generation_lib.Refreshed, **options: Any
) -> tuple[generation_lib.Generation, list[int]]:
  """Refreshes once, and tells which rows ended in what order."""
  plan, draft_params = _drafter_of(kind)
  tokens, lengths = _prompts()
  machine = engine.Engine(
    _CONFIG, drafter=plan, chooser=_fixed(_SHAPES['chain']), rounds_at_once=2
  )
  answers, ended = iter([None, refreshed]), []
  generation = machine.generate(
    _params(),
    tokens,
    lengths,
    _SAMPLINGS['sampled'],
    _KEY,
    draft_params=draft_params,
    refresh=lambda: next(answers, None),
    finished=lambda row, _: ended.append(row),
    **options,
  )
  return generation, ended


def test_a_drafter_is_swapped_midway() -> None:
  other = drafter.init(_CONFIG, jax.random.key(6), _params())
  found, ended = _refreshing(
    'learned', generation_lib.Refreshed(draft_params=other)
  )
  _assert_same(found.completion, _plain('sampled'))
  assert sorted(ended) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_texts_that_arrive_midway_are_copied() -> None:
  """With the answers as texts nearly every draft is right."""
  plain, (tokens, lengths) = _plain('sampled'), _prompts()
  texts = np.zeros((5, 33), np.int32)
  for row, length in enumerate(lengths):
    texts[row, :length] = tokens[row, :length]
    texts[row, length : length + 24] = plain.tokens[row]
  whole = {
    'extra_RE': texts,
    'extra_lengths_R': lengths + 24,
    'extra_group_ids_R': np.arange(5, dtype=np.int32),
  }
  apart = {'groups_N': np.arange(5)}
  found, _ = _refreshing(
    'model_free', generation_lib.Refreshed(texts=whole), **apart
  )
  _assert_same(found.completion, plain)
  nothing, _ = _refreshing('model_free', generation_lib.Refreshed(), **apart)
  assert found.stats.num_passes < 0.7 * nothing.stats.num_passes


def test_engines_that_share_a_queue_part_the_rows() -> None:
  tokens, lengths = _prompts()
  queue = row_queue.RowQueue(range(5))
  found = np.zeros((5, 24), np.int32)
  counts = []

  def work() -> None:
    machine = engine.Engine(_CONFIG, max_batch=1, rounds_at_once=2)
    completion = machine.generate(
      _params(), tokens, lengths, _SAMPLINGS['stopped'], _KEY, queue=queue
    ).completion
    counts.append(int(np.count_nonzero(completion.lengths)))
    found[:] += np.asarray(completion.tokens)

  workers = [threading.Thread(target=work) for _ in range(2)]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join()
  assert sum(counts) == 5
  np.testing.assert_array_equal(found, _plain('stopped').tokens)


def test_a_closed_queue_ends_the_call() -> None:
  tokens, lengths = _prompts()
  queue = row_queue.RowQueue(range(len(lengths)))
  done = []

  def finished(row: int, completion: np.ndarray) -> None:
    del completion
    done.append(row)
    queue.close()

  generation = engine.Engine(_CONFIG, max_batch=1).generate(
    _params(),
    tokens,
    lengths,
    _SAMPLINGS['sampled'],
    _KEY,
    finished=finished,
    queue=queue,
  )
  assert done == [0]
  assert (np.asarray(generation.completion.lengths) > 0).tolist() == [
    row == 0 for row in range(len(lengths))
  ]


def test_a_drafter_that_cannot_copy_refuses_to() -> None:
  plan, _ = _drafter_of('learned')
  arms = strategy_config.StrategyConfig(arms=('3_1_4c',), thresholds=(1,))
  with pytest.raises(ValueError, match='which this drafter cannot'):
    engine.Engine(_CONFIG, drafter=plan, chooser=strategy.Strategy(arms))


def test_the_target_as_its_own_drafter_is_always_right() -> None:
  """A drafter that knows the plain completion is accepted whole."""
  plain = _plain('greedy')
  tokens, lengths = _prompts()

  def draft(draft_params, params, state, shape, sampling):
    del params, sampling
    known, first = draft_params
    places = state.lengths_B[:, None] + jnp.arange(shape.depth)
    index = jnp.clip(places - first[:, None], 0, 23)
    root = jnp.take_along_axis(state.tokens_BS, state.lengths_B[:, None] - 1, 1)
    return tree_lib.chain(root[:, 0], jnp.take_along_axis(known, index, 1))

  def nothing(*arguments, **more):
    del arguments, more

  oracle = state_lib.Drafter(nothing, draft, nothing, nothing, nothing)
  machine = engine.Engine(
    _CONFIG, drafter=oracle, chooser=_fixed(_SHAPES['chain'])
  )
  found = machine.generate(
    _params(),
    tokens[:4],
    lengths[:4],
    _SAMPLINGS['greedy'],
    _KEY,
    draft_params=(plain.tokens[:4], lengths[:4]),
  )
  np.testing.assert_array_equal(found.completion.tokens, plain.tokens[:4])
  # 23 tokens after the first, four a pass; only the last pass is cut short.
  assert found.stats.num_passes == 4 * 6


def test_the_cache_holds_what_a_prefill_writes() -> None:
  tokens, lengths = _prompts()
  plan_drafter = _guesses('random')
  plan = state_lib.Plan(_CONFIG, _SAMPLINGS['sampled'], plan_drafter, 64)
  params = transformer.unstack_layers(_params())
  keys = sampling.row_keys(_KEY, 5)
  state = prefill.start(
    plan,
    False,
    params,
    None,
    jnp.asarray(tokens),
    jnp.asarray(lengths),
    keys,
    jnp.arange(5),
  )
  state = rounds.run(
    plan, _SHAPES['tree'], params, None, state, jnp.int32(4), jnp.int32(0)
  )
  cache = transformer.empty_cache(_CONFIG, batch_size=5, capacity=64)
  whole = transformer.apply(
    _CONFIG,
    params,
    state.tokens_BS,
    cache=cache,
    num_new_B=state.lengths_B - 1,
    with_logits=False,
  ).cache
  assert whole is not None
  np.testing.assert_array_equal(state.cache.lengths_B, whole.lengths_B)
  for row, length in enumerate(state.cache.lengths_B):
    for ours, prefilled in zip(
      (*state.cache.keys, *state.cache.values),
      (*whole.keys, *whole.values),
      strict=True,
    ):
      np.testing.assert_allclose(
        # Entries reach 10; a pass over several tokens adds up differently.
        ours[row, :, :length],
        prefilled[row, :, :length],
        atol=1e-4,
      )


def test_after_a_policy_update_the_new_target_speaks() -> None:
  plan, draft_params = _drafter_of('learned')
  tokens, lengths = _prompts()
  machine = engine.Engine(
    _CONFIG, drafter=plan, chooser=_fixed(_SHAPES['chain'])
  )
  updated = jax.tree.map(lambda x: x * 1.1, _params())
  settings = _SAMPLINGS['greedy']
  for params in (_params(), updated):
    found = machine.generate(
      params, tokens, lengths, settings, _KEY, draft_params=draft_params
    )
    plain = sampling.generate(_CONFIG, params, tokens, lengths, settings, _KEY)
    np.testing.assert_array_equal(found.completion.tokens, plain.tokens)


def test_nothing_is_compiled_twice() -> None:
  plan, draft_params = _drafter_of('learned')
  tokens, lengths = _prompts()
  machine = engine.Engine(
    _CONFIG, drafter=plan, chooser=_fixed(_SHAPES['chain'])
  )
  stats = [
    machine.generate(
      _params(),
      tokens,
      lengths,
      _SAMPLINGS['sampled'],
      jax.random.key(seed),
      draft_params=draft_params,
    ).stats
    for seed in (1, 1)
  ]
  assert stats[0].compile_secs > 0
  assert stats[1].compile_secs == 0
