"""Losses on a batch: next token, masked tokens, or the classes of images."""

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
  config: transformer.TransformerConfig,
  *,
  z_loss: float = 0.0,
  num_resting: int = 0,
) -> LossFn:
  """Cross-entropy in nats of `targets`, weighted by `loss_weights`.

  It serves all objectives: the data pipeline shifts or masks, and an image has
  one target, its class. Large vocabularies are worked off in blocks of tokens
  whose logits are recomputed in the backward pass, so that [B, T, V] is never
  stored.

  Args:
    config: The model.
    z_loss: Weight of log(Z)^2, which keeps logits near 0 (Chowdhery et al.
      2022, section 5, arXiv:2204.02311).
    num_resting: Layers at the bottom that no gradient reaches.
  """

  def loss_fn(params: typing.Params, batch: typing.Batch, key: Any) -> Loss:
    del key  # No dropout.
    hidden = transformer.apply(
      config,
      params,
      inputs_of(config, batch),
      positions_BT=batch.get('positions'),
      segment_ids_BT=batch.get('segment_ids'),
      with_logits=False,
      num_resting=num_resting,
    ).hidden
    head = functools.partial(token_losses, config, z_loss=z_loss)
    return in_blocks(
      head,
      whole_head(config, params),
      hidden,
      batch['targets'],
      batch['loss_weights'],
      vocab_size=config.vocab_size,
    )

  return loss_fn


def inputs_of(
  config: transformer.TransformerConfig, batch: typing.Batch
) -> jax.Array:
  """What the model takes of a batch: images, or tokens."""
  return batch['images' if config.reads_images else 'tokens']


def token_losses(
  config: transformer.TransformerConfig,
  params: typing.Params,
  hidden_BTD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  z_loss: float,
) -> Loss:
  """Cross-entropy of some positions; what they are made of, all at once.

  Args:
    config: The model.
    params: From `whole_head`.
    hidden_BTD: What the head reads.
    targets_BT: Token ids.
    weights_BT: Of each token in the sum.
    z_loss: As for `language_model_loss`.
  """
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

  head = dict(params.get('head', {}))
  if config.tie_embeddings:
    table_VD = whole(params['embedding']['tokens'], ('vocab', None))
    return {'embedding': {'tokens': table_VD}, 'head': head}
  head['kernel'] = whole(head['kernel'], (None, 'vocab'))
  return {'embedding': {}, 'head': head}


def num_blocks(num_rows: int, num_tokens: int, *, vocab_size: int) -> int:
  """The fewest equal blocks of positions whose logits fit on each device.

  Blocks cut the time axis, so that each device keeps its own rows.

  Args:
    num_rows: Of the whole batch.
    num_tokens: Positions of a row.
    vocab_size: Of the model.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    shards = mesh.shape.get('data', 1) * mesh.shape.get('fsdp', 1)
    num_rows = max(1, num_rows // shards)
  position_bytes = num_rows * vocab_size * 4
  most_tokens = max(1, LOGITS_BYTES // position_bytes)
  return next(
    n
    for n in range(1, num_tokens + 1)
    if num_tokens % n == 0 and num_tokens // n <= most_tokens
  )


def cut_blocks(arrays: Any, count: int) -> Any:
  """Arrays [B, T, ...] as [count, B, T / count, ...], to loop over blocks."""

  def cut(x: jax.Array) -> jax.Array:
    blocks = x.reshape(x.shape[0], count, -1, *x.shape[2:])
    return jnp.moveaxis(blocks, 1, 0)

  return jax.tree.map(cut, arrays)


def in_blocks(
  head: Callable[..., Loss],
  params: typing.Params,
  hidden_BTD: Any,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  vocab_size: int,
) -> Loss:
  """Adds up the head's losses over blocks of positions.

  Args:
    head: (params, hidden, targets, weights) -> the loss of a block.
    params: What it reads in every block.
    hidden_BTD: An array, or a tree of them, to be cut along time.
    targets_BT: Token ids.
    weights_BT: Of each token in the sum.
    vocab_size: Of the logits that a block makes.
  """
  count = num_blocks(*targets_BT.shape, vocab_size=vocab_size)
  if count == 1:
    return head(params, hidden_BTD, targets_BT, weights_BT)

  def body(sums: Loss, block: Any) -> tuple[Loss, None]:
    return jax.tree.map(jnp.add, sums, head(params, *block)), None

  blocks = cut_blocks((hidden_BTD, targets_BT, weights_BT), count)
  first = jax.tree.map(lambda x: x[0], blocks)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(head, params, *first),
  )
  return jax.lax.scan(jax.checkpoint(body), zeros, blocks)[0]
