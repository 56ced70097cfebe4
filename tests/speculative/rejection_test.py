"""Sampled chains: every token has the target's law and its log-probability."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from efficient_llm.models import decoding, presets, sampling, transformer
from efficient_llm.speculative import (
  drafter,
  drafting,
  engine,
  model_draft,
  prefill,
  rejection,
  rounds,
  self_draft,
  strategy,
  strategy_config,
)
from efficient_llm.speculative import generation as generation_lib
from efficient_llm.speculative import state as state_lib
from efficient_llm.speculative import tree as tree_lib
from efficient_llm.typing import Array

_CONFIG = presets.get('test', vocab_size=13, max_positions=128)
_SHAPE = tree_lib.DraftShape(3, 1, 4, sampled=True)
_SAMPLINGS = {
  'greedy': sampling.SamplingConfig(24, temperature=0.0),
  'truncated': sampling.SamplingConfig(24, top_k=6, top_p=0.9),
  'stopped': sampling.SamplingConfig(24, stop_tokens=(3, 5)),
}


@functools.lru_cache
def _params() -> Any:
  # Sharper than a fresh model, so that drafts are sometimes right.
  params = transformer.init(_CONFIG, jax.random.key(0))
  return jax.tree.map(lambda x: 2.0 * x if x.ndim > 1 else x, params)


def _logits(texts: np.ndarray) -> Array:
  apply = jax.jit(
    lambda params, x: transformer.apply(_CONFIG, params, x).logits
  )
  return apply(_params(), jnp.asarray(texts))


@functools.lru_cache
def _drafter_of(kind: str) -> tuple[state_lib.Drafter, Any]:
  params = drafter.init(_CONFIG, jax.random.key(5), _params())
  if kind == 'itself':
    return self_draft.drafter(_CONFIG), self_draft.quantize(_params(), bits=5)
  if kind == 'union':
    both = {'learned': params, 'model_free': None}
    return drafting.union(_CONFIG, trusted_match=1), both
  if kind == 'not_a_number':
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
  return model_draft.drafter(_CONFIG), params


def _generate(
  kind: str, name: str, arm: str = '3_1_4s', **options: Any
) -> tuple[np.ndarray, np.ndarray, generation_lib.Generation]:
  plan, draft_params = _drafter_of(kind)
  prompts = jax.random.randint(jax.random.key(1), (5, 9), 0, 13)
  lengths = np.asarray([9, 1, 4, 7, 2], np.int32)
  fixed = strategy_config.StrategyConfig(
    name='fixed', arms=(arm,), thresholds=(1,)
  )
  machine = engine.Engine(
    _CONFIG, drafter=plan, chooser=strategy.Strategy(fixed), **options
  )
  generation = machine.generate(
    _params(),
    prompts,
    lengths,
    _SAMPLINGS[name],
    jax.random.key(7),
    draft_params=draft_params,
  )
  return np.asarray(prompts), lengths, generation


@pytest.mark.parametrize(
  'kind', ['learned', pytest.param('union', marks=pytest.mark.slow)]
)
def test_at_temperature_zero_it_says_what_plain_decoding_says(
  kind: str,
) -> None:
  prompts, lengths, generation = _generate(kind, 'greedy')
  plain = sampling.generate(
    _CONFIG,
    _params(),
    prompts,
    lengths,
    _SAMPLINGS['greedy'],
    jax.random.key(7),
  )
  np.testing.assert_array_equal(generation.completion.tokens, plain.tokens)


@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    ('learned', 'stopped'),
    pytest.param('union', 'truncated', marks=pytest.mark.slow),
    pytest.param('not_a_number', 'truncated', marks=pytest.mark.slow),
  ],
)
def test_log_probs_are_those_of_the_whole_text(kind: str, name: str) -> None:
  """So the cache behind every token held what was accepted before it."""
  prompts, lengths, generation = _generate(
    kind, name, max_batch=2, rounds_at_once=3
  )
  completion = generation.completion
  texts = np.zeros((5, 33), np.int32)
  for row, first in enumerate(lengths):
    texts[row, :first] = prompts[row, :first]
    texts[row, first : first + 24] = completion.tokens[row]
  laws_BSV = sampling.truncate(_logits(texts), _SAMPLINGS[name])
  for row, first in enumerate(lengths):
    count = int(completion.lengths[row])
    new = np.asarray(completion.tokens[row, :count])
    expected = laws_BSV[row, first - 1 + np.arange(count), new]
    found = completion.log_probs[row, :count]
    np.testing.assert_allclose(found, expected, atol=2e-4)
    stops = np.isin(new, _SAMPLINGS[name].stop_tokens)
    assert not stops[:-1].any()
    assert stops[-1] or count == 24


@pytest.mark.parametrize(
  'kind', ['learned', pytest.param('itself', marks=pytest.mark.slow)]
)
def test_texts_have_the_law_of_the_target(kind: str) -> None:
  """Chi-square over all texts of four tokens, two of them drafted at least."""
  config = sampling.SamplingConfig(4, temperature=0.9, top_k=3)
  num_rows = 20_000
  plan, draft_params = _drafter_of(kind)
  prompt = jnp.asarray([2, 7, 1, 2, 7], jnp.int32)
  prepared = decoding.prepare(_CONFIG, _params())
  if plan.prepare is not None:
    draft_params = plan.prepare(draft_params)

  @jax.jit
  def decode(keys_B: Array) -> Array:
    whole = state_lib.Plan(_CONFIG, config, plan, 64)
    count = keys_B.shape[0]
    state = prefill.start(
      whole,
      False,
      prepared,
      draft_params,
      jnp.tile(prompt, (count, 1)),
      jnp.full(count, 5, jnp.int32),
      keys_B,
      None,
    )
    state = rounds.run(
      whole,
      _SHAPE,
      prepared,
      draft_params,
      state,
      jnp.int32(4),
      jnp.int32(0),
    )
    return state.tokens_BS[:, 5:9]

  texts = decode(sampling.row_keys(jax.random.key(3), num_rows))
  possible, probs = _law(prompt, config)
  codes = possible @ 13 ** np.arange(4)
  found = np.asarray(texts) @ 13 ** np.arange(4)
  assert np.isin(found, codes).all()
  observed = (found[:, None] == codes).sum(0)
  frequent = probs * num_rows >= 10
  if not frequent.all():
    observed = np.append(observed[frequent], observed[~frequent].sum())
    probs = np.append(probs[frequent], probs[~frequent].sum())
  assert stats.chisquare(observed, probs * num_rows).pvalue > 1e-3


def _law(
  prompt: Array, config: sampling.SamplingConfig
) -> tuple[np.ndarray, np.ndarray]:
  """Every text the truncated target can draw, and its probability."""
  texts, probs = np.zeros((1, 0), int), np.ones(1)
  for _ in range(4):
    whole = np.concatenate(
      [np.tile(np.asarray(prompt), (len(texts), 1)), texts], 1
    )
    logits = _logits(whole)
    log_laws = np.asarray(sampling.truncate(logits[:, -1], config))
    laws = np.exp(log_laws.astype(np.float64))
    laws /= laws.sum(1, keepdims=True)
    rows, tokens = np.nonzero(laws)
    texts = np.concatenate([texts[rows], tokens[:, None]], 1)
    probs = probs[rows] * laws[rows, tokens]
  return texts, probs


@pytest.mark.slow
def test_draws_are_accepted_more_often_than_the_likeliest_token() -> None:
  """With the target as drafter, all but rounding is accepted."""
  sampled = _generate('itself', 'truncated')[2]
  likeliest = _generate('itself', 'truncated', arm='3_1_4')[2]
  assert sampled.stats.acceptance_length > 2.5
  assert (
    sampled.stats.acceptance_length > 1.2 * likeliest.stats.acceptance_length
  )


def test_an_accepted_stop_token_is_the_last() -> None:
  tree = tree_lib.Tree(
    tokens_BW=jnp.asarray([[1, 2, 0, 2], [1, 2, 2, 2]]),
    parents_BW=jnp.asarray([[0, 0, 1, 2]] * 2),
    depths_BW=jnp.asarray([[0, 1, 2, 3]] * 2),
    num_nodes_B=jnp.asarray([4, 4]),
    log_probs_BKV=rejection.certain(
      jnp.asarray([[2, 0, 2], [2, 2, 2]]), vocab_size=3
    ),
  )
  sure = 50.0 * jax.nn.one_hot(jnp.asarray([[2, 0, 2, 1], [2, 2, 2, 1]]), 3)
  keys_B = sampling.row_keys(jax.random.key(0), 2)
  config = sampling.SamplingConfig(10, stop_tokens=(0,))
  accepted = rejection.accept(tree, sure, keys_B, jnp.asarray([3, 3]), config)
  assert accepted.num_tokens_B.tolist() == [2, 4]
  assert accepted.ended_B.tolist() == [True, False]
  assert accepted.tokens_BE.tolist() == [[2, 0, 0, 0], [2, 2, 2, 1]]
  assert accepted.path_BE.tolist() == [[0, 1, 1, 1], [0, 1, 2, 3]]
  # The limit ends a row as well.
  accepted = rejection.accept(tree, sure, keys_B, jnp.asarray([9, 8]), config)
  assert accepted.num_tokens_B.tolist() == [1, 2]
  assert accepted.ended_B.tolist() == [True, True]


def test_a_drafter_without_a_law_refuses() -> None:
  arms = strategy_config.StrategyConfig(arms=('3_1_4s',), thresholds=(1,))
  with pytest.raises(ValueError, match='drawn at random'):
    engine.Engine(
      _CONFIG,
      drafter=drafting.model_free(),
      chooser=strategy.Strategy(arms),
    )


@pytest.mark.parametrize('name', ['3_2_6s', '0_1_1s', '3_1_4cs', '3_1_4sc'])
def test_only_chains_are_sampled(name: str) -> None:
  with pytest.raises(ValueError, match=r'must be|goes with'):
    tree_lib.DraftShape.parse(name)
