"""Tests of the drafter's loss: alignment, borders, unrolled passes, kinds."""

import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as hypothesis_numpy

from efficient_llm.models import transformer
from efficient_llm.speculative import drafter, drafter_loss
from efficient_llm.training import objectives
from tests import tiny

_MODEL = tiny.SMALL_VOCAB
_KEY = jax.random.key(0)
_TOKEN_LOSSES = (
  'cross_entropy',
  'total_variation',
  'log_acceptance',
  'hybrid',
)


def _settings(**changes: Any) -> drafter_loss.DrafterLossConfig:
  return drafter_loss.DrafterLossConfig(**{'num_passes': 2, **changes})


@functools.cache
def _params() -> Any:
  return jax.jit(drafter.init, static_argnums=0)(_MODEL, jax.random.key(1))


def _batch() -> dict[str, jax.Array]:
  """Two documents of eight tokens a row."""
  return jax.tree.map(jnp.asarray, tiny.batch(batch_size=2))


@functools.cache
def _compiled(settings: drafter_loss.DrafterLossConfig) -> Any:
  return jax.jit(drafter_loss.loss_fn(_MODEL, settings))


def _loss(
  batch: Any, *, key: jax.Array = _KEY, **changes: Any
) -> objectives.Loss:
  loss = _compiled(_settings(**changes))
  return loss(_params(), tiny.params(_MODEL), batch, key)


def _assert_same(one: objectives.Loss, other: objectives.Loss) -> None:
  jax.tree.map(np.testing.assert_array_equal, one, other)


def _first_document_only(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
  weights = jnp.where(batch['segment_ids'] == 1, 1.0, 0.0)
  return {**batch, 'loss_weights': weights}


def test_another_document_of_the_row_has_no_influence() -> None:
  batch = _first_document_only(_batch())
  other = batch['segment_ids'] == 2
  changed = {
    **batch,
    'tokens': jnp.where(other, (batch['tokens'] + 1) % 32, batch['tokens']),
  }
  _assert_same(_loss(changed), _loss(batch))


def test_padding_has_no_influence() -> None:
  batch = _batch()
  padding = batch['segment_ids'] == 2
  batch = {
    **batch,
    'segment_ids': jnp.where(padding, 0, batch['segment_ids']),
    'loss_weights': jnp.ones_like(batch['loss_weights']),
  }
  changed = {
    **batch,
    'tokens': jnp.where(padding, (batch['tokens'] + 1) % 32, batch['tokens']),
  }
  _assert_same(_loss(changed), _loss(batch))


def test_what_comes_behind_the_wanted_feature_has_no_influence() -> None:
  batch = _batch()
  t = 3
  # The pair (t, t+1) counts where the batch weighs position t+1.
  weights = jnp.zeros_like(batch['loss_weights']).at[:, t + 1].set(1.0)
  batch = {**batch, 'loss_weights': weights}
  later = jnp.arange(16) > t + 1
  changed = {
    **batch,
    'tokens': jnp.where(later, (batch['tokens'] + 1) % 32, batch['tokens']),
  }
  _assert_same(_loss(changed), _loss(batch))
  now = {**batch, 'tokens': batch['tokens'].at[:, t + 1].add(1)}
  assert _loss(now).total != _loss(batch).total


@hypothesis.given(
  strategies.lists(strategies.integers(1, 5), min_size=1, max_size=4),
  strategies.integers(0, 3),
)
def test_a_pair_counts_only_inside_a_document(
  lengths: list[int], num_padding: int
) -> None:
  segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  segments = np.pad(segments, (0, num_padding))[None]
  weights = np.arange(1.0, segments.size + 1)[None]
  found = drafter_loss.pair_weights(
    {
      'segment_ids': jnp.asarray(segments),
      'loss_weights': jnp.asarray(weights),
    }
  )
  # All but the last token of each document, with its follower's weight.
  ends = np.cumsum(lengths)
  wanted = np.zeros(segments.size)
  for start, end in zip([0, *ends[:-1]], ends, strict=True):
    wanted[start : end - 1] = weights[0, start + 1 : end]
  np.testing.assert_array_equal(found[0], wanted)


def test_a_pass_sees_what_drafting_step_by_step_sees() -> None:
  num_passes, num_tokens = 3, 8
  target, batch = tiny.params(_MODEL), _batch()
  # One document a row, so that its first eight tokens are all there is.
  batch = {name: x[:, :num_tokens] for name, x in batch.items()}
  batch['loss_weights'] = jnp.ones_like(batch['loss_weights'])
  hidden = transformer.apply(_MODEL, target, batch['tokens']).hidden
  probs = jax.nn.softmax(transformer.unembed(_MODEL, target, hidden))
  forward = jax.jit(drafter.forward, static_argnums=0)
  acceptance = [[] for _ in range(num_passes)]
  for start in range(num_tokens - 1):
    cache = drafter.empty_cache(_MODEL, 2, num_tokens)
    features, cache = forward(
      _MODEL,
      _params(),
      target,
      batch['tokens'][:, 1 : start + 2],
      hidden[:, : start + 1],
      cache=cache,
    )
    for k in range(num_passes):
      t = start + k
      if t + 1 == num_tokens:
        break
      if k:
        features, cache = forward(
          _MODEL,
          _params(),
          target,
          batch['tokens'][:, t + 1 : t + 2],
          features[:, -1:],
          cache=cache,
        )
      logits = transformer.unembed(_MODEL, target, features[:, -1])
      accepted = jnp.minimum(jax.nn.softmax(logits), probs[:, t + 1]).sum(-1)
      acceptance[k].append(accepted)
  loss = _loss(batch, num_passes=num_passes)
  for k in range(num_passes):
    found = loss.metrics[f'acceptance_{k + 1}'] / loss.weight
    # Products of other shapes round differently.
    np.testing.assert_allclose(found, np.mean(acceptance[k]), rtol=1e-4)


def test_the_target_gets_no_gradient() -> None:
  loss = drafter_loss.loss_fn(_MODEL, _settings())

  def total(params: Any, target_params: Any) -> jax.Array:
    return loss(params, target_params, _batch(), _KEY).total

  own, target = jax.jit(jax.grad(total, (0, 1)))(_params(), tiny.params(_MODEL))
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), target)
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(own))


def test_features_the_batch_brings_along_are_those_of_the_target() -> None:
  batch = _batch()
  hidden = transformer.apply(
    _MODEL,
    tiny.params(_MODEL),
    batch['tokens'],
    positions_BT=batch['positions'],
    segment_ids_BT=batch['segment_ids'],
  ).hidden
  jax.tree.map(
    # Another program rounds differently.
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4),
    _loss({**batch, 'hidden': hidden}),
    _loss(batch),
  )


def test_noise_depends_on_the_key_and_only_noise_does() -> None:
  one, other = jax.random.key(1), jax.random.key(2)
  _assert_same(_loss(_batch(), key=one), _loss(_batch(), key=other))
  noisy = functools.partial(_loss, _batch(), noise=0.3)
  _assert_same(noisy(key=one), noisy(key=one))
  assert noisy(key=one).total != noisy(key=other).total


_LOGITS = hypothesis_numpy.arrays(
  np.float32, (1, 2, 5), elements=strategies.floats(-8, 8, width=32)
)


def _distances(p: np.ndarray, q: np.ndarray, **changes: Any) -> Any:
  feature = jnp.zeros((1, 2, 3))
  return drafter_loss.distances(
    _settings(**changes),
    feature,
    feature,
    jnp.asarray(q),
    jax.nn.softmax(jnp.asarray(p)),
  )


@hypothesis.given(_LOGITS, _LOGITS)
def test_the_kinds_of_token_loss_keep_to_their_relations(
  p: np.ndarray, q: np.ndarray
) -> None:
  found = {
    kind: _distances(p, q, token_loss=kind)['token_loss']
    for kind in _TOKEN_LOSSES
  }
  accepted = _distances(p, q)['acceptance']
  kl = optax.kl_divergence(jax.nn.log_softmax(q), jax.nn.softmax(p))
  entropy = optax.softmax_cross_entropy(jnp.asarray(p), jax.nn.softmax(p))
  # Differences of float32 numbers of size 10.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
  close(found['cross_entropy'], kl + entropy)
  l1 = jnp.abs(jax.nn.softmax(p) - jax.nn.softmax(q)).sum(-1)
  close(found['total_variation'], l1 / 2)
  close(jnp.exp(-found['log_acceptance']), accepted)
  share = jnp.exp(-3 * accepted)
  close(found['hybrid'], share * kl + (1 - share) * (1 - accepted))
  close(
    _distances(p, q, token_loss='hybrid', hybrid_rate=0.0)['token_loss'], kl
  )


@hypothesis.given(_LOGITS)
def test_a_drafter_like_the_target_is_always_accepted(p: np.ndarray) -> None:
  found = _distances(p, p)
  np.testing.assert_allclose(found['acceptance'], 1.0, rtol=1e-5)
  np.testing.assert_array_equal(found['agreement'], 1.0)


@pytest.mark.parametrize('kind', ['cross_entropy', 'log_acceptance', 'hybrid'])
def test_laws_that_hardly_meet_still_give_a_gradient(kind: str) -> None:
  p = np.full((1, 2, 5), -15.0, np.float32)
  p[..., 0] = 0
  q = jnp.roll(jnp.asarray(p), 1, axis=-1)

  def total(q: Any, kind: str) -> jax.Array:
    return _distances(p, q, token_loss=kind)['token_loss'].sum()

  strong = jnp.abs(jax.grad(total)(q, kind)).max()
  weak = jnp.abs(jax.grad(total)(q, 'total_variation')).max()
  assert strong > 0.1 > 100 * weak


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'token_loss': 'kl'}, "loss.token_loss='kl' must be one of"),
    ({'noise': -1.0}, 'loss.noise=-1.0 must be 0 or more'),
    ({'token_weight': float('nan')}, 'loss.token_weight=nan'),
    ({'feature_weight': 0.0, 'token_weight': 0.0}, 'must not both be 0'),
    ({'num_passes': 0}, 'loss.num_passes=0 must be at least 1'),
    ({'pass_decay': 0.0}, 'loss.pass_decay=0.0 must be in'),
  ],
)
def test_settings_out_of_range_are_refused(
  changes: dict[str, Any], expected: str
) -> None:
  with pytest.raises(ValueError, match=expected) as error:
    _settings(**changes).validate()
  assert '\n' not in str(error.value)
