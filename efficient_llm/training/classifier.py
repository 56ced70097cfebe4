"""A model with a head of classes: configuration, loss and program.

A linear head is put where the model's own was, and both are trained.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding, typing
from efficient_llm.data import labelled
from efficient_llm.models import attention, transformer
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import objectives, program, step
from efficient_llm.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class ClassifyConfig:
  """All there is to fine-tuning on labels.

  Attributes:
    start: Folder of the run whose newest parameters are gone on from, or
      hf:DIR.
    pooling: What the head reads: 'token' the one that has seen all others (an
      encoder's first, a causal model's last), 'mean' the mean of all.
    num_passes: Passes over the training rows, from which loop.num_steps
      follows; None leaves that as it is.
    seed: Of the head; data.seed orders the rows.
  """

  start: str = ''
  data: labelled.LabelledConfig = labelled.LabelledConfig()
  pooling: Literal['token', 'mean'] = 'token'
  num_passes: float | None = 3.0
  optimizer: optimizer_lib.OptimizerConfig = optimizer_lib.OptimizerConfig()
  loop: loop_lib.LoopConfig = loop_lib.LoopConfig()
  mesh: sharding.MeshConfig = sharding.MeshConfig()
  seed: int = 0

  def validate(self) -> None:
    """Checks every part and the rules across them."""
    typing.check_choices(self, name='config')
    for part in (self.data, self.optimizer, self.loop, self.mesh):
      part.validate()
    if not self.start:
      raise ValueError(
        "start='' must name the folder of a run; set --config.start."
      )
    if self.num_passes is None:
      return
    # Written so that not-a-number fails too.
    if not 0 < self.num_passes < float('inf'):
      raise ValueError(
        f'{self.num_passes=} must be positive; set --config.num_passes.'
      )
    if self.loop.num_steps != loop_lib.LoopConfig.num_steps:
      raise ValueError(
        f'loop.num_steps={self.loop.num_steps} would follow from num_passes='
        f'{self.num_passes}; set --config.num_passes=None, or leave it out.'
      )

  def with_steps(self, num_rows: int) -> 'ClassifyConfig':
    """The same with the steps that the passes over these rows take."""
    if self.num_passes is None:
      return self
    num_steps = math.ceil(self.num_passes * num_rows / self.data.batch_size)
    loop = dataclasses.replace(self.loop, num_steps=num_steps)
    return dataclasses.replace(self, loop=loop)


def build(
  config: ClassifyConfig,
  model: transformer.TransformerConfig,
  dataset: labelled.Dataset,
  mesh: Mesh,
) -> program.Program:
  """The program that trains the model and its new head.

  Args:
    config: The run.
    model: The trained one.
    dataset: What is classified.
    mesh: The devices.
  Raises:
    ValueError: If the model or the batch does not fit the mesh.
  """
  implementation = attention.choose(
    model.attention_implementation, mesh.devices.flat[0].platform
  )
  model = dataclasses.replace(model, attention_implementation=implementation)
  head = head_of(model, dataset.classes.vocab_size)
  head_axes = transformer.logical_axes(head)['head']
  axes = {**transformer.logical_axes(model), 'head': head_axes}
  optimizer = optimizer_lib.make_optimizer(
    config.optimizer, axes, num_steps=config.loop.num_steps
  )

  def init_state(key: jax.Array) -> state_lib.TrainState:
    init_key, train_key = jax.random.split(key)
    params = {
      **transformer.init(model, init_key),
      'head': transformer.init(head, init_key)['head'],
    }
    return state_lib.create(params, optimizer, train_key)

  loss = _loss(model, head, config.pooling)
  train_step = step.make_train_step(
    loss,
    optimizer,
    num_microbatches=config.loop.num_microbatches,
    skip_nonfinite=config.loop.nonfinite == 'skip',
  )
  batch_sharding = sharding.batch_sharding(mesh)
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding)
    for name, x in dataset.batch_at(0).items()
  }
  return program.lay_out(
    program.Parts(axes, init_state, train_step, loss),
    mesh,
    batch,
    num_microbatches=config.loop.num_microbatches,
    seed=config.seed,
  )


def head_of(
  model: transformer.TransformerConfig, num_classes: int
) -> transformer.TransformerConfig:
  """The model with a linear head of classes, as models of images have it."""
  return dataclasses.replace(
    model,
    vocab_size=num_classes,
    tie_embeddings=False,
    mlm_head=False,
    head_bias=True,
  )


def _loss(
  model: transformer.TransformerConfig,
  head: transformer.TransformerConfig,
  pooling: str,
) -> objectives.LossFn:
  """Cross-entropy of the labels, with the share that is right."""

  def loss_fn(
    params: typing.Params, batch: typing.Batch, key: jax.Array
  ) -> objectives.Loss:
    del key  # No dropout.
    is_text_BT = batch['segment_ids'] > 0
    types_BT = batch['token_types'] if model.num_token_types > 1 else None
    hidden_BTD = transformer.apply(
      model,
      params,
      batch['tokens'],
      positions_BT=batch['positions'],
      segment_ids_BT=batch['segment_ids'],
      token_types_BT=types_BT,
      with_logits=False,
    ).hidden
    if pooling == 'mean':
      pooled_B1D = jnp.mean(
        hidden_BTD, 1, where=is_text_BT[..., None], keepdims=True
      )
    elif model.causal:
      last_B1 = is_text_BT.sum(1, keepdims=True) - 1
      pooled_B1D = jnp.take_along_axis(hidden_BTD, last_B1[..., None], 1)
    else:
      pooled_B1D = hidden_BTD[:, :1]
    return objectives.token_losses(
      head,
      objectives.whole_head(head, params),
      pooled_B1D,
      batch['targets'],
      batch['loss_weights'],
      z_loss=0.0,
    )

  return loss_fn
