"""Rollouts that end before all answers are complete, and go on later."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm.models import presets, sampling, transformer
from efficient_llm.speculative import drafter, strategy_config
from efficient_llm.tlt import backlog, rollout, rollout_config

_CONFIG = presets.get('test', vocab_size=13, max_positions=64)
_SAMPLING = sampling.SamplingConfig(16)
_ROLLOUT = rollout_config.RolloutConfig(
  num_prompts=3,
  group_size=2,
  max_live=2,
  rounds_at_once=2,
  num_texts=4,
  sampling=_SAMPLING,
  strategy=strategy_config.StrategyConfig(arms=('3_1_4',), thresholds=(1,)),
)
_PROMPTS = np.repeat(
  np.asarray([[1, 2, 3, 0], [4, 5, 0, 0], [6, 0, 0, 0]], np.int32), 2, 0
)
_LENGTHS = np.repeat(np.asarray([3, 2, 1], np.int32), 2)
_GROUPS = np.repeat([0, 1, 2], 2)


@functools.lru_cache
def _params() -> Any:
  # Sharper than a fresh model, so that drafts are sometimes right.
  params = transformer.init(_CONFIG, jax.random.key(0))
  return jax.tree.map(lambda x: 2.0 * x if x.ndim > 1 else x, params)


@functools.lru_cache
def _workers(
  speculation: rollout_config.Speculation, num_workers: int
) -> rollout.Workers:
  return rollout.Workers(
    dataclasses.replace(_ROLLOUT, speculation=speculation),
    _CONFIG,
    stop_tokens=(5,),
    devices=jax.devices()[:1] * num_workers,
  )


def _run(
  speculation: rollout_config.Speculation,
  num_workers: int,
  *,
  begun: backlog.Answers,
  num_whole: int,
) -> rollout.Outcome:
  return _workers(speculation, num_workers).run(
    _params(),
    _PROMPTS,
    _LENGTHS,
    _GROUPS,
    backlog.keys(0, begun.coins_NC),
    draft_params=drafter.init(_CONFIG, jax.random.key(1), _params()),
    trainer=None,
    begun=begun,
    num_whole=num_whole,
  )


@functools.lru_cache
def _plain() -> sampling.Completion:
  return sampling.generate(
    _CONFIG,
    _params(),
    _PROMPTS,
    _LENGTHS,
    dataclasses.replace(_SAMPLING, stop_tokens=(5,)),
    jax.random.fold_in(jax.random.key(0), 0),
  )


def _begun() -> backlog.Answers:
  return backlog.Answers.new(_GROUPS, backlog.coins(0, 6), 16)


def test_first_one_answer_of_each_group_is_begun() -> None:
  assert backlog.order(_begun()) == [0, 2, 4, 1, 3, 5]


def test_what_was_begun_comes_first_and_what_is_complete_not_at_all() -> None:
  begun = dataclasses.replace(
    _begun(),
    lengths_N=np.asarray([2, 0, 0, 0, 0, 3]),
    ended_N=np.arange(6) == 0,
  )
  assert backlog.order(begun) == [5, 1, 2, 4, 3]


@pytest.mark.parametrize(
  ('speculation', 'num_workers'),
  [
    ('off', 1),
    ('ngram', 1),
    pytest.param('union', 2, marks=pytest.mark.slow),
  ],
)
def test_answers_that_take_several_steps_are_those_of_one(
  speculation: rollout_config.Speculation, num_workers: int
) -> None:
  """As long as the policy stays the same."""
  begun, steps = _begun(), []
  for step in range(4):
    outcome = _run(
      speculation, num_workers, begun=begun, num_whole=min(step + 1, 3)
    )
    begun = outcome.continued(begun, step=step)
    assert len(begun.whole_groups) >= min(step + 1, 3)
    # Other types would compile other programs.
    assert begun.tokens_NT.dtype == begun.lengths_N.dtype == np.int32
    steps.append(outcome.num_tokens)
  assert begun.ended_N.all()
  np.testing.assert_array_equal(begun.tokens_NT, _plain().tokens)
  np.testing.assert_array_equal(begun.lengths_N, _plain().lengths)
  np.testing.assert_allclose(begun.log_probs_NT, _plain().log_probs, atol=1e-4)
  assert sum(steps) == begun.lengths_N.sum()
  assert np.count_nonzero(steps) > 1
  # The steps in which tokens were drawn are known.
  mask = np.arange(16) < begun.lengths_N[:, None]
  assert np.bincount(begun.drawn_NT[mask], minlength=4).tolist() == steps


def test_a_step_with_enough_complete_groups_draws_nothing() -> None:
  ended_N = _GROUPS < 2
  begun = dataclasses.replace(
    _begun(), lengths_N=np.where(ended_N, 3, 0), ended_N=ended_N
  )
  outcome = _run('ngram', 1, begun=begun, num_whole=2)
  assert outcome.num_tokens == 0
  np.testing.assert_array_equal(outcome.lengths_N, begun.lengths_N)


@pytest.mark.parametrize(
  ('share', 'wanted', 'expected'),
  [(1.0, 8, 8), (0.8, 8, 10), (0.75, 8, 11), (0.1, 3, 30)],
)
def test_a_smaller_share_has_more_problems_in_flight(
  share: float, wanted: int, expected: int
) -> None:
  config = dataclasses.replace(_ROLLOUT, finish_share=share)
  config.validate()
  assert config.num_in_flight(wanted) == expected
