"""Tests of the losses: blocks of logits, log-partition penalty, weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import transformer
from efficient_llm.training import objectives
from tests import tiny

_MODEL = tiny.SMALL_VOCAB
_KEY = jax.random.key(0)


def _batch() -> dict[str, jax.Array]:
  return jax.tree.map(jnp.asarray, tiny.batch())


def _loss_and_gradient(**options: Any) -> tuple[objectives.Loss, Any]:
  loss_fn = objectives.language_model_loss(_MODEL, **options)

  def total(params: Any) -> tuple[Any, objectives.Loss]:
    loss = loss_fn(params, _batch(), _KEY)
    return loss.total, loss

  (_, loss), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
    tiny.params(_MODEL)
  )
  return loss, gradient


@pytest.mark.parametrize('num_blocks', [2, 16])
def test_blocks_of_logits_give_the_loss_and_gradient_of_the_whole(
  num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  whole = _loss_and_gradient(z_loss=1e-2)
  batch = _batch()
  num_bytes = batch['tokens'].size * _MODEL.vocab_size * 4
  monkeypatch.setattr(objectives, 'LOGITS_BYTES', num_bytes // num_blocks)
  blocks = _loss_and_gradient(z_loss=1e-2)
  # Sums of float32 in another order.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    blocks,
    whole,
  )


@pytest.mark.parametrize(
  ('most_tokens', 'expected'), [(12, 1), (11, 2), (4, 3), (1, 12), (0, 12)]
)
def test_blocks_are_the_fewest_that_fit_and_part_the_row(
  most_tokens: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(objectives, 'LOGITS_BYTES', most_tokens * 2 * 7 * 4)
  assert objectives.num_blocks(2, 12, vocab_size=7) == expected


def test_logits_in_blocks_are_never_stored_whole(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  batch = _batch()
  monkeypatch.setattr(objectives, 'LOGITS_BYTES', 4 * _MODEL.vocab_size * 8)

  def gradient(params: Any) -> Any:
    loss_fn = objectives.language_model_loss(_MODEL)
    return jax.grad(lambda p: loss_fn(p, batch, _KEY).total)(params)

  text = str(jax.make_jaxpr(gradient)(tiny.params(_MODEL)))
  assert f'f32[8,1,{_MODEL.vocab_size}]' in text
  assert f'f32[8,16,{_MODEL.vocab_size}]' not in text


def test_the_partition_penalty_is_the_weighted_square_of_log_z() -> None:
  params, batch = tiny.params(_MODEL), _batch()
  logits = transformer.apply(
    _MODEL,
    params,
    batch['tokens'],
    positions_BT=batch['positions'],
    segment_ids_BT=batch['segment_ids'],
  ).logits
  log_z = jax.nn.logsumexp(jnp.asarray(logits), -1)
  penalty = 0.5 * jnp.sum(log_z**2 * batch['loss_weights'])
  plain = objectives.language_model_loss(_MODEL)(params, batch, _KEY)
  loss = objectives.language_model_loss(_MODEL, z_loss=0.5)(params, batch, _KEY)
  np.testing.assert_allclose(loss.total - plain.total, penalty, rtol=1e-3)
  np.testing.assert_allclose(loss.metrics['nats'], plain.total, rtol=1e-6)


def test_a_target_without_weight_has_no_influence() -> None:
  params, batch = tiny.params(_MODEL), _batch()
  hidden = batch['loss_weights'] == 0
  assert hidden.any()
  other = (batch['targets'] + 1) % 32
  changed = {**batch, 'targets': jnp.where(hidden, other, batch['targets'])}
  loss_fn = jax.jit(objectives.language_model_loss(_MODEL))
  jax.tree.map(
    np.testing.assert_array_equal,
    loss_fn(params, batch, _KEY),
    loss_fn(params, changed, _KEY),
  )


def test_the_loss_of_parts_adds_up_to_the_loss_of_the_whole() -> None:
  params, batch = tiny.params(_MODEL), _batch()
  loss_fn = jax.jit(objectives.language_model_loss(_MODEL))
  whole = loss_fn(params, batch, _KEY)
  parts = [
    loss_fn(params, {name: x[rows] for name, x in batch.items()}, _KEY)
    for rows in (slice(0, 4), slice(4, 8))
  ]
  # Sums of float32 in another order.
  jax.tree.map(
    lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-5),
    *parts,
    whole,
  )
