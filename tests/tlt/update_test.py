"""The update takes its ratios to the probabilities that tokens were drawn with.

Only where older parameters drew some of them.
"""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm import optimizer, sharding
from efficient_llm.models import presets, sampling, transformer
from efficient_llm.tlt import batches, update
from efficient_llm.training import state as state_lib

_CONFIG = presets.get('test', vocab_size=13, max_positions=16)
_STEP = 4


@functools.lru_cache
def _updater() -> update.Updater:
  return update.Updater(
    update.UpdateConfig(
      sequence_length=16,
      rows_at_once=2,
      optimizer=optimizer.OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
    ),
    _CONFIG,
    sharding.make_mesh(sharding.MeshConfig()),
    sampling=sampling.SamplingConfig(4),
    num_answers=4,
    num_steps=10,
    pad_id=0,
  )


def _rollouts(drawn: list[int] | None) -> batches.Rollouts:
  """Four answers, whose tokens seem 1.25 times as likely as when drawn."""
  prompts = np.asarray([[1, 2], [1, 2], [3, 4], [3, 4]])
  tokens = np.asarray([[5, 6, 7], [7, 8, 0], [9, 9, 1], [2, 0, 0]])
  lengths = np.asarray([3, 2, 3, 1])
  text = np.concatenate([prompts, tokens], 1)
  params = transformer.init(_CONFIG, jax.random.key(0))
  output = transformer.apply(_CONFIG, params, jax.numpy.asarray(text))
  assert output.logits is not None
  laws = np.asarray(jax.nn.log_softmax(output.logits))[:, 1:-1]
  log_probs = np.take_along_axis(laws, tokens[..., None], 2)[..., 0]
  return batches.Rollouts(
    prompts_NP=prompts,
    prompt_lengths_N=np.full(4, 2),
    tokens_NT=tokens,
    lengths_N=lengths,
    log_probs_NT=(log_probs - np.log(1.25)).astype(np.float32),
    rewards_N=np.asarray([0.0, 1.0, 1.0, 0.0]),
    groups_N=np.asarray([0, 0, 1, 1]),
    step=_STEP,
    drawn_NT=None if drawn is None else np.tile(drawn, (4, 1)),
  )


def _metrics(drawn: list[int] | None) -> dict[str, Any]:
  params = transformer.init(_CONFIG, jax.random.key(0))
  updater = _updater()
  state = state_lib.create(params, updater.optimizer, jax.random.key(1))
  return updater.update(state, _rollouts(drawn), reference_params=None)[1]


@pytest.mark.parametrize('drawn', [None, [_STEP] * 3])
def test_the_newest_policy_s_answers_have_ratio_one(
  drawn: list[int] | None,
) -> None:
  assert _metrics(drawn)['ratio'] == 1


def test_older_answers_are_weighed_by_what_they_were_drawn_with() -> None:
  metrics = _metrics([_STEP - 2, _STEP, _STEP])
  # Rounding of one forward pass through two layers.
  np.testing.assert_allclose(metrics['ratio'], 1.25, rtol=1e-4)
  # GRPO's bound is 1.2: where the advantage is positive, the gradient is gone.
  assert 0 < metrics['clip_fraction'] < 1


def test_staleness_counts_steps_of_every_token() -> None:
  rollouts = _rollouts([_STEP - 2, _STEP, _STEP - 1])
  assert rollouts.staleness.tolist() == [2, 0, 1, 2, 0, 2, 0, 1, 2]
  assert rollouts.take(np.asarray([3])).staleness.tolist() == [2]
  assert not _rollouts(None).staleness.any()
