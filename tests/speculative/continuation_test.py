"""Completions that are left and gone on with say what they would have said."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import presets, sampling, transformer
from efficient_llm.speculative import (
  continuation,
  drafter,
  drafting,
  engine,
  row_queue,
  strategy,
  strategy_config,
)
from efficient_llm.speculative import generation as generation_lib

_CONFIG = presets.get('test', vocab_size=13, max_positions=64)
_SAMPLING = sampling.SamplingConfig(14, temperature=0.9, stop_tokens=(5,))
_KEY = jax.random.key(2)
_PROMPTS = np.asarray(
  [[1, 2, 3, 0], [4, 6, 0, 0], [1, 2, 0, 0], [7, 0, 0, 0], [1, 2, 3, 0]],
  np.int32,
)
_LENGTHS = np.asarray([3, 2, 2, 1, 3], np.int32)


@functools.lru_cache
def _params() -> Any:
  # Sharper than a fresh model, so that drafts are sometimes right.
  params = transformer.init(_CONFIG, jax.random.key(0))
  return jax.tree.map(lambda x: 2.0 * x if x.ndim > 1 else x, params)


def _generate(
  speculation: str, params: Any, *, arms: str = '3_1_4', **options: Any
) -> generation_lib.Generation:
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
    strategy_config.StrategyConfig(name='fixed', arms=(arms,), thresholds=(1,))
  )
  machine = engine.Engine(
    _CONFIG, drafter=made, chooser=chooser, max_batch=2, rounds_at_once=2
  )
  return machine.generate(
    params,
    _PROMPTS,
    _LENGTHS,
    _SAMPLING,
    _KEY,
    draft_params=draft_params,
    **options,
  )


@functools.lru_cache
def _plain() -> sampling.Completion:
  return sampling.generate(
    _CONFIG, _params(), _PROMPTS, _LENGTHS, _SAMPLING, _KEY
  )


def _after(num_stretches: int) -> generation_lib.Stop:
  counter = itertools.count()
  return lambda: next(counter) >= num_stretches


def _begun(generation: generation_lib.Generation) -> continuation.Begun:
  completion = generation.completion
  return continuation.Begun(
    np.asarray(completion.tokens), np.asarray(completion.lengths)
  )


def _unfinished(generation: generation_lib.Generation) -> row_queue.RowQueue:
  return row_queue.RowQueue(np.flatnonzero(~generation.ended_N).tolist())


@pytest.mark.parametrize(
  ('speculation', 'arms'),
  [
    ('off', '3_1_4'),
    ('ngram', '3_2_6'),
    pytest.param('union', '3_1_4', marks=pytest.mark.slow),
  ],
)
def test_going_on_changes_nothing_that_is_drawn(
  speculation: str, arms: str
) -> None:
  first = _generate(speculation, _params(), arms=arms, stop=_after(3))
  lengths = np.asarray(first.completion.lengths)
  # One kind of each: complete, left midway, not begun.
  assert first.ended_N.any()
  assert (~first.ended_N & (lengths > 0)).any()
  assert not lengths.all()
  then = _generate(
    speculation,
    _params(),
    arms=arms,
    begun=_begun(first),
    queue=_unfinished(first),
  )
  found = jax.tree.map(np.add, first.completion, then.completion)
  np.testing.assert_array_equal(found.tokens, _plain().tokens)
  np.testing.assert_array_equal(found.lengths, _plain().lengths)
  np.testing.assert_allclose(found.log_probs, _plain().log_probs, atol=1e-4)
  assert (first.ended_N | then.ended_N).all()
  assert then.stats.num_tokens == then.completion.lengths.sum()


def test_whoever_is_told_of_an_answer_hears_all_of_it() -> None:
  first = _generate('off', _params(), stop=_after(3))
  heard: dict[int, list[int]] = {}
  _generate(
    'off',
    _params(),
    begun=_begun(first),
    queue=_unfinished(first),
    finished=lambda row, tokens: heard.update({row: tokens.tolist()}),
  )
  assert sorted(heard) == np.flatnonzero(~first.ended_N).tolist()
  for row, tokens in heard.items():
    expected = _plain().tokens[row, : _plain().lengths[row]]
    assert tokens == expected.tolist()


@pytest.mark.slow
def test_the_rest_is_drawn_from_the_newer_policy() -> None:
  """As by plain decoding of the new model behind the old one's tokens."""
  first = _generate('union', _params(), stop=_after(3))
  newer = jax.tree.map(lambda x: 1.3 * x, _params())
  begun = _begun(first)
  then = _generate(
    'union', newer, begun=begun, queue=_unfinished(first)
  ).completion
  compared = 0
  for row in np.flatnonzero(~first.ended_N & (begun.lengths_N > 0)):
    start = begun.lengths_N[row]
    text = [
      *_PROMPTS[row, : _LENGTHS[row]].tolist(),
      *begun.tokens_NT[row, :start].tolist(),
    ]
    for index in range(start, start + int(then.lengths[row])):
      hidden = transformer.apply(_CONFIG, newer, jnp.asarray([text])).hidden
      logits = transformer.unembed(_CONFIG, newer, hidden[:, -1])
      keys = sampling.row_keys(_KEY, 5)[row : row + 1]
      token, log_prob = sampling.draw(
        logits, keys, jnp.asarray([index]), _SAMPLING
      )
      assert then.tokens[row, index] == token[0]
      np.testing.assert_allclose(
        then.log_probs[row, index], log_prob[0], atol=1e-4
      )
      text.append(int(token[0]))
      compared += 1
  assert compared > 5


def test_texts_are_no_wider_than_allowed() -> None:
  begun = continuation.Begun(
    np.ones((1, 100), np.int32), np.asarray([96], np.int32)
  )
  texts, lengths = begun.texts(
    np.full((1, 4), 2, np.int32),
    np.asarray([3], np.int32),
    np.asarray([0, 0]),
    most=100,
  )
  assert texts.shape == (2, 100)
  assert lengths.tolist() == [99, 99]
  assert texts[1].tolist() == [2] * 3 + [1] * 96 + [0]
