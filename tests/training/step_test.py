"""Tests of the train step: gradients, accumulation, skipping, compilation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding
from efficient_llm.models import transformer
from efficient_llm.training import objectives, state, step
from tests import tiny

_MODEL = tiny.SMALL_VOCAB


@functools.cache
def _state(**optimizer: Any) -> tuple[state.TrainState, Any]:
  made = tiny.optimizer(_MODEL, **optimizer)
  return state.create(tiny.params(_MODEL), made, jax.random.key(1)), made


@functools.cache
def _step(optimizer: optimizer_lib.Optimizer, **options: Any) -> step.TrainStep:
  loss_fn = objectives.language_model_loss(_MODEL)
  return jax.jit(step.make_train_step(loss_fn, optimizer, **options))


@functools.cache
def _sgd(learning_rate: float = 1.0) -> optimizer_lib.Optimizer:
  """Whose update is the gradient, so that parameters show it."""
  return optimizer_lib.Optimizer(optax.sgd(learning_rate), lambda _: 1.0)


def _assert_equal(tree: Any, other: Any) -> None:
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_microbatches_without_weight_are_left_out() -> None:
  plain_loss = objectives.language_model_loss(_MODEL)

  def loss_fn(params: Any, batch: Any, key: Any) -> objectives.Loss:
    """Not a number where nothing counts, so that looking would show."""
    loss = plain_loss(params, batch, key)
    spoilt = jnp.where(loss.weight > 0, loss.total, jnp.nan)
    return dataclasses.replace(loss, total=spoilt)

  start = state.create(tiny.params(_MODEL), _sgd(), jax.random.key(1))
  batch = tiny.batch()
  short = {name: x[:4] for name, x in batch.items()}
  # Parts are strided: rows 0, 2, 4, 6 make the first of two.
  padded = {name: x.copy() for name, x in batch.items()}
  for name, x in padded.items():
    x[::2], x[1::2] = short[name], 0
  plain = _step(_sgd())(start, short)
  step_fn = step.make_train_step(
    loss_fn, _sgd(), num_microbatches=2, skip_empty=True
  )
  skipped = jax.jit(step_fn)(start, padded)
  for name, value in plain[1].items():
    np.testing.assert_allclose(skipped[1][name], value, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    skipped[0].params,
    plain[0].params,
  )


@pytest.mark.parametrize('num_microbatches', [2, 8])
def test_accumulation_gives_the_whole_batch_s_loss_and_gradient(
  num_microbatches: int,
) -> None:
  start = state.create(tiny.params(_MODEL), _sgd(), jax.random.key(1))
  batch = tiny.batch()
  whole, whole_metrics = _step(_sgd())(start, batch)
  parts, parts_metrics = _step(_sgd(), num_microbatches=num_microbatches)(
    start, batch
  )
  assert whole_metrics.keys() == parts_metrics.keys()
  # Sums of float32 in another order.
  for name, value in whole_metrics.items():
    np.testing.assert_allclose(parts_metrics[name], value, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    parts.params,
    whole.params,
  )


def test_the_update_is_the_gradient_of_the_weighted_mean_loss() -> None:
  params = tiny.params(_MODEL)
  batch = jax.tree.map(jnp.asarray, tiny.batch())

  def mean_loss(params: Any) -> jax.Array:
    logits = transformer.apply(
      _MODEL,
      params,
      batch['tokens'],
      positions_BT=batch['positions'],
      segment_ids_BT=batch['segment_ids'],
    ).logits
    nats = -jnp.take_along_axis(
      jax.nn.log_softmax(jnp.asarray(logits)), batch['targets'][..., None], -1
    )[..., 0]
    weights = batch['loss_weights']
    return (nats * weights).sum() / weights.sum()

  wanted_loss, wanted = jax.jit(jax.value_and_grad(mean_loss))(params)
  start = state.create(params, _sgd(), jax.random.key(1))
  after, metrics = _step(_sgd())(start, batch)
  np.testing.assert_allclose(metrics['loss'], wanted_loss, rtol=1e-6)
  jax.tree.map(
    # float32: a gradient is the difference of parameters of size one.
    lambda old, new, grad: np.testing.assert_allclose(
      old - new, grad, rtol=1e-4, atol=2e-6
    ),
    params,
    after.params,
    wanted,
  )


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_skipping_leaves_parameters_and_moments_bit_equal(bad: float) -> None:
  start, optimizer = _state()
  train_step = _step(optimizer, skip_nonfinite=True)
  before, _ = train_step(start, tiny.batch())
  poisoned = tiny.batch()
  poisoned['loss_weights'][3, 5] = bad
  after, metrics = train_step(before, poisoned)
  assert not metrics['finite']
  assert after.step == before.step + 1
  _assert_equal(after.params, before.params)
  _assert_equal(after.opt_state, before.opt_state)


def test_a_batch_after_a_skipped_one_trains_as_if_nothing_had_been() -> None:
  start, optimizer = _state()
  train_step = _step(optimizer, skip_nonfinite=True)
  poisoned = tiny.batch()
  poisoned['loss_weights'][0, 0] = np.nan
  skipped, _ = train_step(start, poisoned)
  after, metrics = train_step(skipped, tiny.batch())
  direct, _ = train_step(start, tiny.batch())
  assert metrics['finite']
  _assert_equal(after.params, direct.params)


def test_an_update_that_is_not_finite_is_noticed_before_any_loss() -> None:
  huge = _sgd(learning_rate=float('inf'))
  start = state.create(tiny.params(_MODEL), huge, jax.random.key(1))
  _, metrics = _step(huge)(start, tiny.batch())
  assert np.isfinite(metrics['loss'])
  assert np.isfinite(metrics['grad_norm'])
  assert not metrics['finite']


def test_a_batch_without_weight_has_no_gradient() -> None:
  start = state.create(tiny.params(_MODEL), _sgd(), jax.random.key(1))
  batch = tiny.batch()
  batch['loss_weights'][:] = 0
  after, metrics = _step(_sgd())(start, batch)
  assert metrics['loss'] == 0
  assert metrics['tokens'] == 0
  _assert_equal(after.params, start.params)


def test_a_batch_that_does_not_part_into_microbatches_is_refused() -> None:
  start, optimizer = _state()
  with pytest.raises(ValueError, match='8 rows must be divisible by') as error:
    _step(optimizer, num_microbatches=3)(start, tiny.batch())
  assert '\n' not in str(error.value)


def test_steps_after_the_first_reuse_the_program_and_the_buffers() -> None:
  mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
  optimizer = tiny.optimizer(_MODEL)
  num_traces = 0
  plain = objectives.language_model_loss(_MODEL)

  def counting(*arguments: Any) -> objectives.Loss:
    nonlocal num_traces
    num_traces += 1
    return plain(*arguments)

  def make() -> state.TrainState:
    params = transformer.init(_MODEL, jax.random.key(0))
    return state.create(params, optimizer, jax.random.key(1))

  shardings = state.shardings(
    jax.eval_shape(make), transformer.logical_axes(_MODEL), mesh
  )
  rows = sharding.batch_sharding(mesh)
  train_step = step.jit_train_step(
    step.make_train_step(counting, optimizer), shardings, rows
  )
  with jax.set_mesh(mesh):
    current = jax.jit(make, out_shardings=shardings)()
    for _ in range(5):
      previous = current
      current, _ = train_step(previous, jax.device_put(tiny.batch(), rows))
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves(previous))
  assert num_traces == 1


@pytest.mark.parametrize('causal', [True, False])
def test_training_on_one_batch_learns_it(causal: bool) -> None:
  model = dataclasses.replace(_MODEL, causal=causal)
  optimizer = tiny.optimizer(model, learning_rate=3e-2, weight_decay=0.0)
  loss_fn = objectives.language_model_loss(model)
  train_step = jax.jit(step.make_train_step(loss_fn, optimizer))
  batch = tiny.batch(batch_size=2, num_tokens=8)
  if not causal:
    # Token 0 stands for the mask; every other target is hidden.
    batch['targets'] = batch['tokens'].copy()
    batch['loss_weights'][:] = np.arange(8) % 2
    batch['tokens'] = np.where(batch['loss_weights'] > 0, 0, batch['tokens'])
  current = state.create(tiny.params(model), optimizer, jax.random.key(1))
  losses = []
  for _ in range(120):
    current, metrics = train_step(current, batch)
    losses.append(float(metrics['loss']))
  assert losses[0] > 2
  assert losses[-1] < 0.1
