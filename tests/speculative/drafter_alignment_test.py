"""Tests that a drafter is trained on the right pairs of token and feature."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficient_llm.models import transformer
from efficient_llm.speculative import drafter, drafter_loss
from tests import tiny


def _markov_target() -> tuple[transformer.TransformerConfig, Any]:
  """A target whose next token is surely (5 x + 1) mod 16, x the newest."""
  size = 16
  model = dataclasses.replace(
    tiny.MODEL, vocab_size=size, embed_dim=size, tie_embeddings=False
  )
  params = transformer.init(model, jax.random.key(0))
  # A layer that adds nothing: the feature is the token's own direction.
  layers = jax.tree.map(jnp.zeros_like, params['layers'])
  following = (5 * np.arange(size) + 1) % size
  head = 5 * jax.nn.one_hot(following, size)
  return model, {
    **params,
    'layers': layers,
    'embedding': {'tokens': jnp.eye(size)},
    'head': {'kernel': head},
  }


def _trained_acceptance(*, shift: int, num_passes: int) -> list[float]:
  """Acceptance after training on random text.

  Args:
    shift: By how many positions the tokens come too late.
    num_passes: Depth of drafts.
  """
  model, target = _markov_target()
  settings = drafter_loss.DrafterLossConfig(num_passes=num_passes)
  loss_fn = drafter_loss.loss_fn(model, settings)
  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(params: Any, state: Any, key: jax.Array) -> Any:
    shape = (16, 12)
    tokens = jax.random.randint(key, shape, 0, 16)
    batch = {
      'hidden': transformer.apply(model, target, tokens).hidden,
      'tokens': jnp.roll(tokens, shift, axis=1),
      'segment_ids': jnp.ones(shape, jnp.int32),
      'positions': jnp.broadcast_to(jnp.arange(12), shape),
      'loss_weights': jnp.ones(shape),
    }

    def total(params: Any) -> Any:
      loss = loss_fn(params, target, batch, key)
      return loss.mean, loss

    (_, loss), grads = jax.value_and_grad(total, has_aux=True)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  params = drafter.init(model, jax.random.key(1))
  state, loss = optimizer.init(params), None
  for index in range(150):
    key = jax.random.fold_in(jax.random.key(0), index)
    params, state, loss = step(params, state, key)
  assert loss is not None
  return [
    float(loss.metrics[f'acceptance_{k + 1}'] / loss.weight)
    for k in range(num_passes)
  ]


def test_a_drafter_learns_a_target_that_reads_the_newest_token_only() -> None:
  assert min(_trained_acceptance(shift=0, num_passes=2)) > 0.98


def test_the_token_before_the_newest_does_not_do() -> None:
  # It says nothing about the law of one of 16 tokens.
  assert max(_trained_acceptance(shift=1, num_passes=1)) < 0.2
