"""The train step: gradients, accumulation, update. Every technique uses it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import typing
from efficient_llm.training import objectives
from efficient_llm.training.state import TrainState

TrainStep = Callable[
  [TrainState, typing.Batch], tuple[TrainState, typing.Metrics]
]
EvalStep = Callable[[typing.Params, typing.Batch], objectives.Loss]


def make_train_step(
  loss_fn: objectives.LossFn,
  optimizer: optimizer_lib.Optimizer,
  *,
  num_microbatches: int = 1,
  skip_nonfinite: bool = False,
  skip_empty: bool = False,
) -> TrainStep:
  """A pure function (state, batch) -> (state, metrics), not yet jitted.

  The gradient is that of total loss over total weight of the whole batch, so
  accumulation changes nothing but rounding. Metrics are scalars: loss,
  grad_norm, learning_rate, tokens (the weight), finite (whether loss, gradient
  and update are), and the loss function's own.

  Args:
    loss_fn: Gives a `Loss` for params, batch and key.
    optimizer: Whose transformation updates the parameters.
    num_microbatches: Parts a batch is worked off in, one after the other.
    skip_nonfinite: Leave everything but the step number unchanged where loss,
      gradient or update is not finite.
    skip_empty: Microbatches whose 'loss_weights' are all 0 cost nothing: one
      program then serves batches of any size up to a largest one.

  Returns:
    The step.

  Raises:
    ValueError: On tracing, if the batch does not part into microbatches.
  """

  def train_step(
    state: TrainState, batch: typing.Batch
  ) -> tuple[TrainState, typing.Metrics]:
    key = jax.random.wrap_key_data(state.key)
    key = jax.random.fold_in(key, state.step)
    loss, grads = _gradients(
      loss_fn,
      state.params,
      batch,
      key,
      num_microbatches=num_microbatches,
      skip_empty=skip_empty,
    )
    weight = jnp.maximum(loss.weight, 1e-9)
    grads = jax.tree.map(lambda g: g / weight, grads)
    grad_norm = optimizer_lib.global_norm(grads)
    updates, opt_state = optimizer.transform.update(
      grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    # The update too: a huge learning rate spoils parameters before any loss.
    update_norm = optimizer_lib.global_norm(updates)
    finite = jnp.isfinite(loss.total + grad_norm + update_norm)
    if skip_nonfinite:
      params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
      )
    metrics = {
      **{name: value / weight for name, value in loss.metrics.items()},
      'loss': loss.mean,
      'grad_norm': grad_norm,
      'learning_rate': jnp.asarray(optimizer.schedule(state.step)),
      'tokens': loss.weight,
      'finite': finite,
    }
    state = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    )
    return state, metrics

  return train_step


def _gradients(
  loss_fn: objectives.LossFn,
  params: typing.Params,
  batch: typing.Batch,
  key: jax.Array,
  *,
  num_microbatches: int,
  skip_empty: bool,
) -> tuple[objectives.Loss, typing.Params]:
  """Summed loss and the gradient of its total."""

  def total(
    params: typing.Params, batch: typing.Batch, key: jax.Array
  ) -> tuple[typing.Scalar, objectives.Loss]:
    loss = loss_fn(params, batch, key)
    return loss.total, loss

  value_and_grad = jax.value_and_grad(total, has_aux=True)
  if num_microbatches == 1:
    (_, loss), grads = value_and_grad(params, batch, key)
    return loss, grads

  def part(x: jax.Array) -> jax.Array:
    if x.shape[0] % num_microbatches:
      raise ValueError(
        f'The batch of {x.shape[0]} rows must be divisible by '
        f'{num_microbatches=}; change data.batch_size.'
      )
    # Every device contributes rows to every part: no data moves.
    x = x.reshape(-1, num_microbatches, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  def body(sums: Any, inputs: Any) -> tuple[Any, None]:
    microbatch, index = inputs

    def added(sums: Any) -> Any:
      (_, loss), grads = value_and_grad(
        params, microbatch, jax.random.fold_in(key, index)
      )
      return jax.tree.map(jnp.add, sums, (loss, grads))

    if not skip_empty:
      return added(sums), None
    is_empty = (microbatch['loss_weights'] == 0).all()
    return jax.lax.cond(is_empty, lambda sums: sums, added, sums), None

  parts = jax.tree.map(part, dict(batch))
  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(value_and_grad, params, first, key)
  (_, loss_shape), grads_shape = shapes
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), (loss_shape, grads_shape)
  )
  indices = jnp.arange(num_microbatches)
  return jax.lax.scan(body, zeros, (parts, indices))[0]


def jit_train_step(
  step: TrainStep,
  state_shardings: TrainState,
  batch_sharding: jax.sharding.Sharding,
) -> TrainStep:
  """Compiles the step over a mesh; the old state's buffers are reused."""
  return jax.jit(
    step,
    in_shardings=(state_shardings, batch_sharding),
    out_shardings=(state_shardings, None),
    donate_argnums=0,
  )


def jit_eval_step(
  loss_fn: objectives.LossFn,
  param_shardings: typing.PyTree,
  batch_sharding: jax.sharding.Sharding,
) -> EvalStep:
  """Compiles the loss alone, for validation."""

  def eval_step(params: typing.Params, batch: typing.Batch) -> objectives.Loss:
    return loss_fn(params, batch, jax.random.key(0))

  return jax.jit(eval_step, in_shardings=(param_shardings, batch_sharding))
