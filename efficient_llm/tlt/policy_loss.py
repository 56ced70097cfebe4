"""Policy losses of the GRPO family on packed answers.

A loss is a sum over tokens with weights that the host made: the algorithms
differ in the ratio, in its bounds and in these weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm import typing
from efficient_llm.models import sampling as sampling_lib
from efficient_llm.models import transformer
from efficient_llm.tlt import advantages, batches
from efficient_llm.training import objectives

# (params, batch) -> [B, T].
LogProbsFn = Callable[[typing.Params, typing.Batch], jax.Array]

# For each algorithm how far the ratio may fall below and rise above 1, and how
# the losses of tokens are averaged.
_DEFAULTS: dict[str, tuple[float, float, batches.Aggregation]] = {
  'grpo': (0.2, 0.2, 'sequence'),
  'dr_grpo': (0.2, 0.2, 'constant'),
  'dapo': (0.2, 0.28, 'token'),
  'gspo': (3e-4, 4e-4, 'sequence'),
}


@dataclasses.dataclass(frozen=True)
class PolicyLossConfig:
  """Which policy loss, and where it departs from the algorithm's own settings.

  Attributes:
    algorithm: 'grpo' (Shao et al. 2024), 'dr_grpo' (Liu et al. 2025), 'dapo'
      (Yu et al. 2025) or 'gspo' (Zheng et al. 2025).
    clip_low: How far below 1 a ratio still gives a gradient; None is the
      algorithm's: 0.2, for GSPO 3e-4.
    clip_high: How far above 1; None is the algorithm's: 0.2, for DAPO 0.28, for
      GSPO 4e-4.
    dual_clip: Largest ratio that still gives a gradient where the advantage is
      negative (c of Ye et al. 2020, arXiv:1912.09729); None is off.
    kl_weight: Of the divergence from the reference policy; above 0 the batch
      must hold 'reference_log_probs'.
    aggregation: How `batches.pack` weighs tokens; None is the algorithm's:
      'sequence' for GRPO and GSPO, 'constant' for Dr. GRPO, 'token' for DAPO.
  """

  algorithm: advantages.Algorithm = 'grpo'
  clip_low: float | None = None
  clip_high: float | None = None
  dual_clip: float | None = None
  kl_weight: float = 0.0
  aggregation: batches.Aggregation | None = None

  @property
  def ratio_bounds(self) -> tuple[float, float]:
    """Lower and upper bound of the ratio."""
    low, high, _ = _DEFAULTS[self.algorithm]
    low = low if self.clip_low is None else self.clip_low
    high = high if self.clip_high is None else self.clip_high
    return 1 - low, 1 + high

  @property
  def resolved_aggregation(self) -> batches.Aggregation:
    """`aggregation`, the algorithm's where None."""
    return self.aggregation or _DEFAULTS[self.algorithm][-1]

  def validate(self) -> None:
    """Checks ranges; raises ValueError with one line."""
    typing.check_choices(self, name='policy')
    if self.aggregation not in ('token', 'sequence', 'constant', None):
      raise ValueError(
        f'policy.aggregation={self.aggregation!r} must be one of token, '
        'sequence, constant, None.'
      )
    low, high = self.ratio_bounds
    if not 0 <= low < 1:
      raise ValueError(
        f'policy.clip_low={self.clip_low} must be in (0, 1]; 1 is no bound.'
      )
    if not high > 1:
      raise ValueError(
        f'policy.clip_high={self.clip_high} must be above 0; inf is no bound.'
      )
    if self.dual_clip is not None and not self.dual_clip > 1:
      raise ValueError(
        f'policy.dual_clip={self.dual_clip} must be above 1; None is off.'
      )
    if not 0 <= self.kl_weight < float('inf'):
      raise ValueError(f'policy.kl_weight={self.kl_weight} must be 0 or more.')


def loss_fn(
  config: transformer.TransformerConfig,
  settings: PolicyLossConfig,
  *,
  sampling: sampling_lib.SamplingConfig,
) -> objectives.LossFn:
  """Makes the loss of (params, batch, key) for `training.step`.

  The batch is that of `batches.pack`. A target counts where its loss weight is
  above 0; the total is divided by the number of these, which the weights allow
  for. Metrics are means over the same targets, whatever the aggregation:

    ratio: New probability over old, before clipping.
    clip_fraction: Where the bounds of the ratio took away the gradient.
    entropy: Of the policy's next-token law, in nats.
    rollout_gap: |new - rollout| log-probability: before the first update on
      the data, what trainer and sampler disagree by.
    kl: From the reference policy, in nats, where the batch holds one.

  Probabilities are those at the sampler's temperature. Top-k and top-p are
  ignored, as is usual: a sampler that truncates draws from another law, which
  shows in rollout_gap.

  Without 'old_log_probs' the new policy counts as the old one, right for the
  first update on the data: the gradient is REINFORCE's.

  Args:
    config: The model.
    settings: Which loss.
    sampling: How the answers were drawn.
  Raises:
    ValueError: If a setting breaks a rule or sampling is greedy; on tracing,
      if kl_weight lacks its 'reference_log_probs'.
  """
  settings.validate()
  laws = _laws_fn(config, temperature=sampling.temperature)

  def loss(params: typing.Params, batch: typing.Batch, key: Any) -> Any:
    del key  # No dropout.
    log_probs_BT, entropy_BT = laws(params, batch)
    losses_BT, metrics = token_losses(settings, log_probs_BT, batch)
    metrics['entropy'] = entropy_BT
    gap_BT = log_probs_BT - batch['rollout_log_probs']
    metrics['rollout_gap'] = jnp.abs(jax.lax.stop_gradient(gap_BT))
    counts_BT = batch['loss_weights'] > 0
    return objectives.Loss(
      total=jnp.sum(losses_BT * batch['loss_weights']),
      weight=counts_BT.sum(dtype=jnp.float32),
      metrics={
        name: jnp.sum(jnp.where(counts_BT, x_BT, 0.0))
        for name, x_BT in metrics.items()
      },
    )

  return loss


def log_probs_fn(
  config: transformer.TransformerConfig, *, temperature: float
) -> LogProbsFn:
  """Makes the function that gives the log-probability of every target.

  For 'old_log_probs' and 'reference_log_probs', under the loss's law at the
  sampler's temperature; `batches.unpack` picks those of completions.
  """
  laws = _laws_fn(config, temperature=temperature)
  return lambda params, batch: laws(params, batch)[0]


def token_losses(
  settings: PolicyLossConfig, log_probs_BT: jax.Array, batch: typing.Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """[B, T] of the loss, and of its metrics ratio, clip_fraction and kl.

      loss = -min(r A, clip(r, 1 - low, 1 + high) A) + kl_weight k3
      k3 = exp(d) - d - 1,  d = log reference - log new

  With r the ratio of new to old probability of the token, or for GSPO that of
  the whole answer to the power of 1 / its length, which all of the answer's
  tokens share. With a dual clip, r is at most c where A is negative.

  Args:
    settings: Which loss.
    log_probs_BT: The new policy's, of the targets.
    batch: From `batches.pack`; what does not count in it has loss 0.
  Source: Shao et al. 2024, equations 3 and 4, arXiv:2402.03300; Yu et al. 2025,
    DAPO, equation 8, arXiv:2503.14476; Zheng et al. 2025, GSPO, equations 5 and
    7, arXiv:2507.18071.
  """
  counts_BT = batch['loss_weights'] > 0
  old_BT = batch.get('old_log_probs', jax.lax.stop_gradient(log_probs_BT))
  # Masked before exp, lest a padding token's infinity times 0 gives NaN.
  log_ratio_BT = jnp.where(counts_BT, log_probs_BT - old_BT, 0.0)
  if settings.algorithm == 'gspo':
    log_ratio_BT = _segment_means(log_ratio_BT, counts_BT, batch['segment_ids'])
  ratio_BT = jnp.exp(log_ratio_BT)
  advantages_BT = jnp.where(counts_BT, batch['advantages'], 0.0)
  low, high = settings.ratio_bounds
  # The minimum of the two products, written as a bound of the ratio: it has no
  # ties, at which a minimum would share its gradient.
  bounded_BT = jnp.where(
    advantages_BT < 0,
    jnp.clip(ratio_BT, low, settings.dual_clip),
    jnp.minimum(ratio_BT, high),
  )
  clipped_BT = (bounded_BT != ratio_BT) & (advantages_BT != 0)
  losses_BT = -bounded_BT * advantages_BT
  metrics = {'ratio': ratio_BT, 'clip_fraction': clipped_BT * 1.0}
  if 'reference_log_probs' in batch:
    distance_BT = jnp.where(
      counts_BT, batch['reference_log_probs'] - log_probs_BT, 0.0
    )
    kl_BT = jnp.expm1(distance_BT) - distance_BT
    metrics['kl'] = kl_BT
    if settings.kl_weight:
      losses_BT += settings.kl_weight * kl_BT
  elif settings.kl_weight:
    raise ValueError(
      f'policy.kl_weight={settings.kl_weight} needs reference_log_probs in the '
      'batch; pack them or set it to 0.'
    )
  return losses_BT, jax.lax.stop_gradient(metrics)


def _segment_means(
  x_BT: jax.Array, counts_BT: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
  """Means over what counts in each segment; elsewhere `x_BT` is 0."""

  def row(x_T: jax.Array, counts_T: jax.Array, ids_T: jax.Array) -> jax.Array:
    # Ids go from 0 (padding) to at most one for each position.
    num_segments = len(ids_T) + 1
    sums = jax.ops.segment_sum(x_T, ids_T, num_segments)
    sizes = jax.ops.segment_sum(counts_T * 1.0, ids_T, num_segments)
    return (sums / jnp.maximum(sizes, 1.0))[ids_T]

  return jax.vmap(row)(x_BT, counts_BT, segment_ids_BT)


def _laws_fn(
  config: transformer.TransformerConfig, *, temperature: float
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Makes (params, batch) -> log-probabilities of targets, and entropy, [B, T].

  Logits are made in blocks of positions, and again in the backward pass, so
  that [B, T, V] is never stored. The entropy carries no gradient.
  """
  if not temperature > 0:
    raise ValueError(
      f'sampling.temperature={temperature} must be above 0 to train a policy.'
    )

  def head(params: typing.Params, hidden_BTD: Any, targets_BT: Any) -> Any:
    logits_BTV = transformer.unembed(config, params, hidden_BTD)
    log_probs_BTV = jax.nn.log_softmax(logits_BTV / temperature)
    chosen_BT1 = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], -1)
    fixed_BTV = jax.lax.stop_gradient(log_probs_BTV)
    entropy_BT = -jnp.sum(jnp.exp(fixed_BTV) * fixed_BTV, -1)
    return chosen_BT1[..., 0], entropy_BT

  def laws(params: typing.Params, batch: typing.Batch) -> Any:
    hidden_BTD = transformer.apply(
      config,
      params,
      batch['tokens'],
      positions_BT=batch['positions'],
      segment_ids_BT=batch['segment_ids'],
      with_logits=False,
    ).hidden
    shape = batch['targets'].shape
    num_blocks = objectives.num_blocks(*shape, vocab_size=config.vocab_size)
    one = functools.partial(head, objectives.whole_head(config, params))
    if num_blocks == 1:
      return one(hidden_BTD, batch['targets'])

    block = jax.checkpoint(lambda inputs: one(*inputs))
    blocks = objectives.cut_blocks((hidden_BTD, batch['targets']), num_blocks)
    parts = jax.lax.map(block, blocks)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(shape), parts)

  return laws
