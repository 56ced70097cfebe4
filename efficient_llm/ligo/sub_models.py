"""Every step trains a sub-model drawn by chance: bert2BERT's first stage.

A sub-model is the lowest n, 2n, ... layers with the head; only its top n layers
and the head are updated, and the layers below have no backward pass. All else,
moments included, stays as it is.
Source: Chen et al. 2022, bert2BERT, section 4.2.2, arXiv:2110.07143.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import typing
from efficient_llm.ligo.config import LigoConfig
from efficient_llm.models import attention, transformer
from efficient_llm.training import objectives, pretrain, step
from efficient_llm.training import state as state_lib

# Of the key that a step has, the part that draws the sub-model.
_DRAW = 1


def make_step(config: LigoConfig, program: pretrain.Program) -> step.TrainStep:
  """The train step, compiled on first use; one program with a branch for each.

  Args:
    config: The run, with `sub_model_layers`.
    program: Of the whole model.
  """
  model = dataclasses.replace(
    config.model,
    attention_implementation=attention.choose(
      config.model.attention_implementation,
      program.mesh.devices.flat[0].platform,
    ),
  )
  shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state)
  return step.jit_train_step(
    train_step(config, model), shardings, program.batch_sharding
  )


def train_step(
  config: LigoConfig, model: transformer.TransformerConfig
) -> step.TrainStep:
  """The step as a function, not yet jitted.

  Args:
    config: The run, with `sub_model_layers`.
    model: Of the run, with a way to compute attention.
  """
  optimizer = optimizer_lib.make_optimizer(
    config.optimizer,
    transformer.logical_axes(model),
    num_steps=config.loop.num_steps,
  )
  lengths = config.sub_model_lengths

  def of_length(length: int) -> step.TrainStep:
    num_resting = length - lengths.step
    whole = objectives.language_model_loss(
      model, z_loss=config.z_loss, num_resting=num_resting
    )

    def loss_fn(
      params: typing.Params, batch: typing.Batch, key: Any
    ) -> objectives.Loss:
      layers = jax.tree.map(lambda x: x[:length], params['layers'])
      return whole({**params, 'layers': layers}, batch, key)

    one = step.make_train_step(
      loss_fn,
      optimizer,
      num_microbatches=config.loop.num_microbatches,
      skip_nonfinite=config.loop.nonfinite == 'skip',
    )
    return _leaving_others(one, model, range(num_resting, length))

  branches = [of_length(length) for length in lengths]

  def step_of_one(
    state: state_lib.TrainState, batch: typing.Batch
  ) -> tuple[state_lib.TrainState, typing.Metrics]:
    key = jax.random.wrap_key_data(state.key)
    key = jax.random.fold_in(jax.random.fold_in(key, state.step), _DRAW)
    chosen = jax.random.randint(key, (), 0, len(branches))
    return jax.lax.switch(chosen, branches, state, batch)

  return step_of_one


def _leaving_others(
  one: step.TrainStep, model: transformer.TransformerConfig, layers: range
) -> Callable[..., Any]:
  """The step whose parameters and moments outside some layers stay."""
  abstract = transformer.abstract_params(model)
  is_trained = jax.tree.map(lambda _: False, abstract)
  for name in ('final_norm', 'head', 'class_layers'):
    if name in abstract:
      is_trained[name] = jax.tree.map(lambda _: True, abstract[name])
  if model.tie_embeddings:
    is_trained['embedding']['tokens'] = True
  inside = np.isin(np.arange(model.num_layers), layers)
  is_trained['layers'] = jax.tree.map(
    lambda x: inside.reshape(-1, *[1] * (x.ndim - 1)), abstract['layers']
  )

  def step_of_some(
    state: state_lib.TrainState, batch: typing.Batch
  ) -> tuple[state_lib.TrainState, typing.Metrics]:
    after, metrics = one(state, batch)
    moments = optimizer_lib.like_params(
      state.opt_state, is_trained, otherwise=True
    )
    params, opt_state = jax.tree.map(
      jnp.where,
      (is_trained, moments),
      (after.params, after.opt_state),
      (state.params, state.opt_state),
    )
    return after.replace(params=params, opt_state=opt_state), metrics

  return step_of_some
