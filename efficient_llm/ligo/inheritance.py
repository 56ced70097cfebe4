"""Knowledge inheritance: the small model teaches the large one at first.

The loss is (1 - a) CE + a T^2 KL(small || large), both at temperature T in the
divergence, where a falls linearly to 0; from then on it is plain training.
Source: Qin et al. 2022, arXiv:2105.13880, section 3; constants as LiGO's
baseline has them (a from 1, T = 2, 44 % of the steps).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import typing
from efficient_llm.ligo.config import InheritConfig, LigoConfig
from efficient_llm.models import attention, transformer
from efficient_llm.models.config import TransformerConfig
from efficient_llm.training import objectives, pretrain
from efficient_llm.training import state as state_lib
from efficient_llm.training import step as step_lib

# (state, batch, teacher's params) -> (state, metrics).
TaughtStep = Callable[
  [state_lib.TrainState, typing.Batch, typing.Params],
  tuple[state_lib.TrainState, typing.Metrics],
]


def loss(
  config: InheritConfig,
  small: TransformerConfig,
  large: TransformerConfig,
  small_params: typing.Params,
  *,
  share: typing.Scalar,
  z_loss: float = 0.0,
) -> objectives.LossFn:
  """The large model's loss while it is taught; metric 'kl' is the divergence.

  Args:
    config: How it is taught.
    small: The teacher.
    large: The model that learns.
    small_params: Of the teacher; no gradient reaches them.
    share: a, of the teacher.
    z_loss: As for `objectives.language_model_loss`.
  """

  def loss_fn(
    params: typing.Params, batch: typing.Batch, key: Any
  ) -> objectives.Loss:
    del key  # No dropout.
    heads, hidden = {}, {}
    for name, model, own in (
      ('small', small, small_params),
      ('large', large, params),
    ):
      hidden[name] = transformer.apply(
        model,
        own,
        objectives.inputs_of(model, batch),
        positions_BT=batch.get('positions'),
        segment_ids_BT=batch.get('segment_ids'),
        with_logits=False,
      ).hidden
      heads[name] = objectives.whole_head(model, own)
    return objectives.in_blocks(
      head,
      {**heads, 'share': share},
      hidden,
      batch['targets'],
      batch['loss_weights'],
      # Logits of both are alive at once.
      vocab_size=2 * large.vocab_size,
    )

  def head(
    params: typing.Params,
    hidden: dict[str, jax.Array],
    targets_BT: jax.Array,
    weights_BT: jax.Array,
  ) -> objectives.Loss:
    plain = objectives.token_losses(
      large,
      params['large'],
      hidden['large'],
      targets_BT,
      weights_BT,
      z_loss=z_loss,
    )
    log_probs = {
      name: jax.nn.log_softmax(
        transformer.unembed(model, params[name], hidden[name])
        / config.temperature
      )
      for name, model in (('small', small), ('large', large))
    }
    theirs = jax.lax.stop_gradient(log_probs['small'])
    kl_BT = jnp.sum(jnp.exp(theirs) * (theirs - log_probs['large']), -1)
    kl = jnp.sum(kl_BT * weights_BT)
    share = params['share']
    return dataclasses.replace(
      plain,
      total=(1 - share) * plain.total + share * config.temperature**2 * kl,
      metrics={**plain.metrics, 'kl': kl},
    )

  return loss_fn


def share_at(
  config: InheritConfig, step: typing.Scalar, *, num_steps: int
) -> typing.Scalar:
  """The teacher's share of the loss at a step.

  Args:
    config: How the large model is taught.
    step: Counted from 0.
    num_steps: Of the run.
  """
  left = 1 - step / taught_steps(config, num_steps=num_steps)
  return config.weight * jnp.maximum(left, 0.0)


def taught_steps(config: InheritConfig, *, num_steps: int) -> int:
  """Steps in which the teacher is asked; its arguments as `share_at`'s."""
  return max(1, round(config.share_of_steps * num_steps))


def flops(config: LigoConfig, small: TransformerConfig) -> float:
  """What the teacher's forward passes cost in a whole run.

  Args:
    config: The run.
    small: The teacher.
  """
  if not config.inherit.weight:
    return 0.0
  steps = taught_steps(config.inherit, num_steps=config.loop.num_steps)
  of_small = dataclasses.replace(config, model=small)
  # A forward pass is a third of a training step.
  return steps * config.tokens_per_step * of_small.flops_per_token / 3


def make_step(
  config: LigoConfig,
  small: TransformerConfig,
  small_params: typing.Params,
  program: pretrain.Program,
) -> step_lib.TrainStep:
  """The train step of a large model that is taught, compiled on first use.

  Args:
    config: The run.
    small: The teacher.
    small_params: Of it, on the program's mesh.
    program: Of the large model.
  """
  platform = program.mesh.devices.flat[0].platform
  small, large = (
    dataclasses.replace(
      model,
      attention_implementation=attention.choose(
        model.attention_implementation, platform
      ),
    )
    for model in (small, config.model)
  )
  shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state)
  compiled = jax.jit(
    train_step(config, small, large),
    in_shardings=(shardings, program.batch_sharding, None),
    out_shardings=(shardings, None),
    donate_argnums=0,
  )
  return lambda state, batch: compiled(state, batch, small_params)


def train_step(
  config: LigoConfig, small: TransformerConfig, large: TransformerConfig
) -> TaughtStep:
  """The step as a function, not yet jitted.

  Args:
    config: The run.
    small: The teacher, with a way to compute attention.
    large: The model that learns, with the same.
  """
  optimizer = optimizer_lib.make_optimizer(
    config.optimizer,
    transformer.logical_axes(large),
    num_steps=config.loop.num_steps,
  )
  plain = objectives.language_model_loss(large, z_loss=config.z_loss)

  def taught_step(
    state: state_lib.TrainState, batch: typing.Batch, teacher: typing.Params
  ) -> tuple[state_lib.TrainState, typing.Metrics]:
    share = share_at(
      config.inherit, state.step, num_steps=config.loop.num_steps
    )
    taught = loss(
      config.inherit, small, large, teacher, share=share, z_loss=config.z_loss
    )

    def untaught(
      params: typing.Params, batch: typing.Batch, key: Any
    ) -> objectives.Loss:
      found = plain(params, batch, key)
      metrics = {**found.metrics, 'kl': jnp.zeros_like(found.total)}
      return dataclasses.replace(found, metrics=metrics)

    def loss_fn(
      params: typing.Params, batch: typing.Batch, key: Any
    ) -> objectives.Loss:
      # Once its share is 0 the teacher is asked no more.
      return jax.lax.cond(share > 0, taught, untaught, params, batch, key)

    one = step_lib.make_train_step(
      loss_fn,
      optimizer,
      num_microbatches=config.loop.num_microbatches,
      skip_nonfinite=config.loop.nonfinite == 'skip',
    )
    return one(state, batch)

  return taught_step
