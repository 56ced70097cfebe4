"""Losses on a batch of packed text: next token, or masked tokens."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm import sharding, typing
from efficient_llm.models import transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
  """A loss as a sum and its weight, so that parts of a batch add up exactly.

  Attributes:
    total: Summed loss; its gradient is taken.
    weight: What the total is divided by (tokens that count).
    metrics: Further sums, divided by the same weight when reported.
  """

  total: typing.Scalar
  weight: typing.Scalar
  metrics: dict[str, typing.Scalar] = dataclasses.field(default_factory=dict)

  @property
  def mean(self) -> typing.Scalar:
    return self.total / jnp.maximum(self.weight, 1e-9)


LossFn = Callable[[typing.Params, typing.Batch, jax.Array], Loss]

# Logits of this many bytes at most are alive at once.
LOGITS_BYTES = 256 * 2**20


def language_model_loss(
  config: transformer.TransformerConfig, *, z_loss: float = 0.0
) -> LossFn:
  """Cross-entropy in nats of `targets`, weighted by `loss_weights`.

  It serves both objectives: the data pipeline shifts or masks. Large
  vocabularies are worked off in blocks of tokens whose logits are recomputed in
  the backward pass, so that [B, T, V] is never stored.

  Args:
    config: The model.
    z_loss: Weight of log(Z)^2, which keeps logits near 0 (Chowdhery et al.
      2022, section 5, arXiv:2204.02311).
  """

  def loss_fn(params: typing.Params, batch: typing.Batch, key: Any) -> Loss:
    del key  # No dropout.
    hidden = transformer.apply(
      config,
      params,
      batch['tokens'],
      positions_BT=batch.get('positions'),
      segment_ids_BT=batch.get('segment_ids'),
      with_logits=False,
    ).hidden
    head = functools.partial(_token_losses, config, z_loss=z_loss)
    return _in_blocks(
      head,
      whole_head(config, params),
      hidden,
      batch['targets'],
      batch['loss_weights'],
      vocab_size=config.vocab_size,
    )

  return loss_fn


def _token_losses(
  config: transformer.TransformerConfig,
  params: typing.Params,
  hidden_BTD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  z_loss: float,
) -> Loss:
  logits_BTV = transformer.unembed(config, params, hidden_BTD)
  log_z_BT = jax.nn.logsumexp(logits_BTV, -1)
  chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
  nats = jnp.sum((log_z_BT - chosen_BT) * weights_BT)
  correct = jnp.sum((jnp.argmax(logits_BTV, -1) == targets_BT) * weights_BT)
  total = nats
  if z_loss:
    total += z_loss * jnp.sum(jnp.square(log_z_BT) * weights_BT)
  return Loss(total, weights_BT.sum(), {'nats': nats, 'accuracy': correct})


def whole_head(
  config: transformer.TransformerConfig, params: typing.Params
) -> typing.Params:
  """What the head reads, cast and gathered from the fsdp axis once.

  Otherwise every block would gather it and share its gradient anew: for 8 B
  parameters on 256 chips the all-reduces then carry nine times the bytes.
  """

  def whole(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    return sharding.constrain(x.astype(config.dtype), names)

  table_VD = params['embedding']['tokens']
  head = dict(params.get('head', {}))
  if config.tie_embeddings:
    table_VD = whole(table_VD, ('vocab', None))
  else:
    head['kernel'] = whole(head['kernel'], (None, 'vocab'))
  return {'embedding': {'tokens': table_VD}, 'head': head}


def _in_blocks(
  head: Callable[..., Loss],
  params: typing.Params,
  hidden_BTD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  vocab_size: int,
) -> Loss:
  """Adds up the head's losses over blocks of positions.

  Blocks cut the time axis, so that each device keeps its own rows.
  """
  batch_size, num_tokens = targets_BT.shape
  rows = batch_size
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    shards = mesh.size // mesh.shape.get('tensor', 1)
    rows = max(1, batch_size // shards)
  num_blocks = 1
  while (
    rows * (num_tokens // num_blocks) * vocab_size * 4 > LOGITS_BYTES
    and num_tokens % (2 * num_blocks) == 0
  ):
    num_blocks *= 2
  if num_blocks == 1:
    return head(params, hidden_BTD, targets_BT, weights_BT)

  def cut(x: jax.Array) -> jax.Array:
    shape = (batch_size, num_blocks, num_tokens // num_blocks, *x.shape[2:])
    return jnp.moveaxis(x.reshape(shape), 1, 0)

  def body(sums: Loss, block: Any) -> tuple[Loss, None]:
    return jax.tree.map(jnp.add, sums, head(params, *block)), None

  blocks = jax.tree.map(cut, (hidden_BTD, targets_BT, weights_BT))
  first = jax.tree.map(lambda x: x[0], blocks)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(head, params, *first),
  )
  return jax.lax.scan(jax.checkpoint(body), zeros, blocks)[0]
