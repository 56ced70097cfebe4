"""The loss of a drafter: features and next-token laws, unrolled in training.

(h_t, embed(x_{t+1})) is to give h_{t+1}, and by the target's head the law of
x_{t+2}. With several passes the drafter also learns to go on from its own
features, as it will when it drafts.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from efficient_llm import typing
from efficient_llm.models import attention, kv_cache, transformer
from efficient_llm.speculative import drafter
from efficient_llm.training import objectives

# (params, target_params, batch, key); only the first are differentiated.
DrafterLossFn = Callable[
  [typing.Params, typing.Params, typing.Batch, jax.Array], objectives.Loss
]

_SMALLEST_ACCEPTANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class DrafterLossConfig:
  """What a drafter is trained for.

  Attributes:
    feature_weight: Of the smooth L1 distance of the features (EAGLE).
    token_weight: Of the distance of the laws of the next token.
    token_loss: With p the target's law, q the drafter's and a = sum(min(p, q))
      the share of drafts that is accepted: 'cross_entropy' of q under p;
      'total_variation' is 1 - a; 'log_acceptance' is -log a; 'hybrid' goes from
      KL(p|q) to 1 - a as a grows, with weight exp(-hybrid_rate * a) on the
      former. The last two keep a gradient where p and q hardly meet (Samarin et
      al. 2026, LK losses, arXiv:2602.23881).
    hybrid_rate: How fast 'hybrid' leaves KL.
    num_passes: Depth of drafts that is trained; from the second pass on the
      drafter reads its own features.
    pass_decay: Weight of each pass as a share of the one before.
    noise: Half the width of uniform noise on h_t, in training only.
  """

  feature_weight: float = 1.0
  token_weight: float = 1.0
  token_loss: Literal[
    'cross_entropy', 'total_variation', 'log_acceptance', 'hybrid'
  ] = 'cross_entropy'
  hybrid_rate: float = 3.0
  num_passes: int = 3
  pass_decay: float = 0.8
  noise: float = 0.0

  def validate(self) -> None:
    """Checks ranges; raises ValueError with one line."""
    typing.check_choices(self, name='loss')
    for name in ('feature_weight', 'token_weight', 'hybrid_rate', 'noise'):
      if not 0 <= getattr(self, name) < float('inf'):
        raise ValueError(
          f'loss.{name}={getattr(self, name)} must be 0 or more.'
        )
    if not self.feature_weight + self.token_weight > 0:
      raise ValueError(
        'loss.feature_weight and loss.token_weight must not both be 0; raise '
        'one.'
      )
    if self.num_passes < 1:
      raise ValueError(
        f'loss.num_passes={self.num_passes} must be at least 1; raise it.'
      )
    if not 0 < self.pass_decay <= 1:
      raise ValueError(f'loss.pass_decay={self.pass_decay} must be in (0, 1].')


def loss_fn(
  config: transformer.TransformerConfig, settings: DrafterLossConfig
) -> DrafterLossFn:
  """Makes the loss of (params, target_params, batch, key).

  A pair counts where position t+1 is in the same document and the batch gives
  its own target weight. Metrics are means over the batch: acceptance_k and
  agreement_k (of the likeliest tokens) of the k-th token of a draft, and
  feature_loss and token_loss of the first.

  The batch may hold 'hidden' [B, T, D], which the target gave before; otherwise
  the target runs. Logits [B, T, V] of one pass and of the target are stored.

  Args:
    config: The target model.
    settings: What to train for.
  Source: Li et al. 2024, EAGLE, training of the draft models,
    arXiv:2401.15077; the unrolled passes are the training-time test of EAGLE-3
    (Li et al. 2025, arXiv:2503.01840). Differs: of EAGLE-3's features only the
    last layer's, and no vocabulary of its own.
  """

  def loss(
    params: typing.Params,
    target_params: typing.Params,
    batch: typing.Batch,
    key: jax.Array,
  ) -> objectives.Loss:
    target_params = jax.lax.stop_gradient(target_params)
    segments_BT = batch['segment_ids']
    hidden_BTD = jax.lax.stop_gradient(_hidden(config, target_params, batch))
    wanted_BTD = _following(hidden_BTD)
    probs_BTV = jax.nn.softmax(
      transformer.unembed(config, target_params, wanted_BTD)
    )
    weights_BT = pair_weights(batch)
    feature_BTD = hidden_BTD
    if settings.noise:
      feature_BTD += jax.random.uniform(
        key,
        hidden_BTD.shape,
        hidden_BTD.dtype,
        minval=-settings.noise,
        maxval=settings.noise,
      )
    cache = None
    shares = [settings.pass_decay**k for k in range(settings.num_passes)]
    total, metrics = jnp.float32(0), {}
    for k, share in enumerate(shares):
      # A draft that is k tokens deep began k positions before.
      same_BT = segments_BT == jnp.roll(segments_BT, k, axis=1)
      begun_BT = same_BT & (jnp.arange(segments_BT.shape[1]) >= k)
      mask, cache = _unrolled(config, settings, segments_BT, k, cache)
      feature_BTD, cache = drafter.forward_masked(
        config,
        params,
        target_params,
        _following(batch['tokens']),
        feature_BTD,
        positions_BT=batch['positions'],
        mask=mask,
        cache=cache,
      )
      losses = distances(
        settings,
        feature_BTD,
        wanted_BTD,
        transformer.unembed(config, target_params, feature_BTD),
        probs_BTV,
      )
      pass_weights_BT = weights_BT * begun_BT
      sums = {
        name: jnp.sum(x_BT * pass_weights_BT) for name, x_BT in losses.items()
      }
      total += (share / sum(shares)) * (
        settings.feature_weight * sums['feature_loss']
        + settings.token_weight * sums['token_loss']
      )
      # Later passes have fewer pairs, but metrics are divided by all.
      scale = weights_BT.sum() / jnp.maximum(pass_weights_BT.sum(), 1e-9)
      for name in ('acceptance', 'agreement'):
        metrics[f'{name}_{k + 1}'] = scale * sums[name]
      if k == 0:
        metrics |= {name: sums[name] for name in ('feature_loss', 'token_loss')}
      feature_BTD = jnp.roll(feature_BTD, 1, axis=1)
    return objectives.Loss(total, weights_BT.sum(), metrics)

  return loss


def pair_weights(batch: typing.Batch) -> jax.Array:
  """[B, T] weight of the pair (t, t+1): 0 across documents and in padding."""
  segments_BT = batch['segment_ids']
  has_next_BT = (segments_BT == _following(segments_BT)) & (segments_BT > 0)
  has_next_BT = has_next_BT.at[:, -1].set(False)
  return has_next_BT * _following(batch['loss_weights'])


def _following(x_BT: jax.Array) -> jax.Array:
  """At t what stands at t+1; the last column wraps and must not count."""
  return jnp.roll(x_BT, -1, axis=1)


def _hidden(
  config: transformer.TransformerConfig,
  target_params: typing.Params,
  batch: typing.Batch,
) -> jax.Array:
  if 'hidden' in batch:
    return batch['hidden']
  return transformer.apply(
    config,
    target_params,
    batch['tokens'],
    positions_BT=batch['positions'],
    segment_ids_BT=batch['segment_ids'],
    with_logits=False,
  ).hidden


def _unrolled(
  config: transformer.TransformerConfig,
  settings: DrafterLossConfig,
  segments_BT: jax.Array,
  k: int,
  cache: kv_cache.KVCache | None,
) -> tuple[attention.Mask, kv_cache.KVCache | None]:
  """Mask and room for the k-th pass, from 0.

  The k-th pass at t stands k tokens deep in a draft that began at t-k. It sees
  the first pass up to t-k, where features are the target's, and of each later
  pass j its own draft's position, t-k+j. Keys lie pass behind pass.
  """
  if settings.num_passes == 1:
    return attention.Mask(causal=True, segment_ids_BT=segments_BT), None
  batch_size, num_tokens = segments_BT.shape
  query = jnp.arange(num_tokens)[:, None]
  key = jnp.arange(num_tokens)[None]
  seen = [key <= query - k, *(key == query - k + j for j in range(1, k + 1))]
  same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
  allowed_BTS = jnp.tile(same_BTT, (1, 1, k + 1)) & jnp.concatenate(seen, 1)
  room = drafter.empty_cache(config, batch_size, num_tokens)
  if cache is None:
    cache = room
  else:
    cache = kv_cache.KVCache(
      keys=(jnp.concatenate([cache.keys[0], room.keys[0]], 2),),
      values=(jnp.concatenate([cache.values[0], room.values[0]], 2),),
      lengths_B=cache.lengths_B + num_tokens,
    )
  return attention.Mask(causal=False, allowed_BTS=allowed_BTS), cache


def distances(
  settings: DrafterLossConfig,
  feature_BTD: jax.Array,
  wanted_BTD: jax.Array,
  logits_BTV: jax.Array,
  probs_BTV: jax.Array,
) -> dict[str, jax.Array]:
  """[B, T] of each: feature_loss, token_loss, acceptance, agreement.

  Args:
    settings: Which token_loss.
    feature_BTD: The drafter's.
    wanted_BTD: The target's.
    logits_BTV: The drafter's.
    probs_BTV: The target's law.
  """
  feature_BTD = feature_BTD.astype(jnp.float32)
  features_BTD = optax.huber_loss(feature_BTD, wanted_BTD.astype(jnp.float32))
  q_BTV, log_q_BTV = jax.nn.softmax(logits_BTV), jax.nn.log_softmax(logits_BTV)
  acceptance_BT = jnp.minimum(probs_BTV, q_BTV).sum(-1)
  cross_entropy_BT = -jnp.sum(probs_BTV * log_q_BTV, -1)
  if settings.token_loss == 'cross_entropy':
    token_BT = cross_entropy_BT
  elif settings.token_loss == 'total_variation':
    token_BT = 1 - acceptance_BT
  elif settings.token_loss == 'log_acceptance':
    token_BT = -jnp.log(acceptance_BT + _SMALLEST_ACCEPTANCE)
  else:
    entropy_BT = -jax.scipy.special.xlogy(probs_BTV, probs_BTV).sum(-1)
    kl_share_BT = jnp.exp(
      -settings.hybrid_rate * jax.lax.stop_gradient(acceptance_BT)
    )
    token_BT = kl_share_BT * (cross_entropy_BT - entropy_BT)
    token_BT += (1 - kl_share_BT) * (1 - acceptance_BT)
  # Of probabilities on both sides: logits may differ where those are equal.
  agree_BT = jnp.argmax(q_BTV, -1) == jnp.argmax(probs_BTV, -1)
  return {
    'feature_loss': features_BTD.mean(-1),
    'token_loss': token_BT,
    'acceptance': acceptance_BT,
    'agreement': agree_BT.astype(jnp.float32),
  }
