"""Tests of the policy losses: golden values, gradients, packing, metrics.

Over 300 lines: the tests with a model share its few compiled programs.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm import sharding
from efficient_llm.models import presets, sampling, transformer
from efficient_llm.tlt import batches, policy_loss
from efficient_llm.training import objectives
from tests import tiny

# Learned positions, as rotary ones would hide where an answer begins.
_MODEL = presets.get(
  'test', num_layers=1, positions='learned', vocab_size=11, max_positions=64
)
_SAMPLING = sampling.SamplingConfig(temperature=0.7, max_new_tokens=6)
_KEY = jax.random.key(0)
_ADVANTAGES = np.array([1.0, -0.5, 0.25, -2.0, 0.75])


def _config(**changes: Any) -> policy_loss.PolicyLossConfig:
  return policy_loss.PolicyLossConfig(**changes)


def _row(
  ratios: list[float],
  advantages: list[float],
  *,
  segments: list[int] | None = None,
  weights: list[float] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """New log-probabilities and a batch of one row, whose old ones are -1."""
  segments = segments or list(range(1, len(ratios) + 1))
  batch = {
    'loss_weights': weights or [1.0] * len(ratios),
    'advantages': advantages,
    'old_log_probs': [-1.0] * len(ratios),
  }
  arrays = {name: jnp.array([x]) for name, x in batch.items()}
  return (
    jnp.log(jnp.array([ratios])) - 1,
    {**arrays, 'segment_ids': jnp.array([segments])},
  )


def _losses(*row: Any, **changes: Any) -> tuple[Any, Any, Any]:
  """Loss and d sum(loss) / d log-probability of each token, and metrics."""

  def total(log_probs: jax.Array, batch: Any) -> tuple[jax.Array, Any]:
    out = policy_loss.token_losses(_config(**changes), log_probs, batch)
    return out[0].sum(), out

  gradient, (losses, metrics) = jax.jit(jax.grad(total, has_aux=True))(*row)
  return losses[0], gradient[0], {name: x[0] for name, x in metrics.items()}


@pytest.mark.parametrize(
  ('algorithm', 'low', 'high'),
  [
    ('grpo', 0.8, 1.2),
    ('dr_grpo', 0.8, 1.2),
    ('dapo', 0.8, 1.28),
    ('gspo', 0.9997, 1.0004),
  ],
)
def test_the_ratio_is_bounded_where_that_makes_the_surrogate_smaller(
  algorithm: Any, low: float, high: float
) -> None:
  # One answer each, so that GSPO's ratio is the token's.
  row = _row([1.5, 0.5, 1.5, 0.5, 1.5], [2.0, 2.0, -2.0, -2.0, 0.0])
  wanted = [
    -2 * high,  # min(1.5 * 2, high * 2)
    -2 * 0.5,  # min(0.5 * 2, low * 2)
    2 * 1.5,  # -min(-1.5 * 2, -high * 2)
    2 * low,  # -min(-0.5 * 2, -low * 2)
    0,
  ]
  losses, gradient, metrics = _losses(*row, algorithm=algorithm)
  np.testing.assert_allclose(losses, wanted, rtol=1e-6)
  # d ratio / d log-probability is the ratio; nothing where it is bounded.
  np.testing.assert_allclose(gradient, [0, -1, 3, 0, 0], rtol=1e-6)
  np.testing.assert_array_equal(metrics['clip_fraction'], [1, 0, 0, 1, 0])
  np.testing.assert_allclose(
    metrics['ratio'], [1.5, 0.5, 1.5, 0.5, 1.5], rtol=1e-6
  )


def test_the_bounds_can_be_set() -> None:
  row = _row([1.5, 0.5], [2.0, -2.0])
  losses, _, _ = _losses(*row, clip_low=0.1, clip_high=0.3)
  np.testing.assert_allclose(losses, [-1.3 * 2, 0.9 * 2], rtol=1e-6)


def test_the_dual_clip_bounds_a_large_ratio_of_a_bad_answer() -> None:
  row = _row([5.0, 2.0, 5.0], [-2.0, -2.0, 2.0])
  losses, gradient, metrics = _losses(*row, dual_clip=3.0)
  # -max(min(-10, -2.4), -3 * 2) = 6; -max(-4, -6) = 4; -min(10, 2.4).
  np.testing.assert_allclose(losses, [6, 4, -2.4], rtol=1e-6)
  np.testing.assert_allclose(gradient, [0, 4, 0], rtol=1e-6)
  np.testing.assert_array_equal(metrics['clip_fraction'], [1, 0, 1])


def test_without_a_dual_clip_a_bad_answers_ratio_has_no_upper_bound() -> None:
  losses, _, _ = _losses(*_row([5.0], [-2.0]))
  np.testing.assert_allclose(losses, [10], rtol=1e-6)


def test_gspo_takes_the_geometric_mean_of_an_answers_ratios() -> None:
  # Answers of two, three and one tokens behind one another, then padding; the
  # first position of each is a prompt's and does not count.
  row = _row(
    [9.0, 4.0, 1.0, 9.0, 0.5, 0.5, 2.0, 9.0, 3.0, 9.0],
    [0.0, 1.0, 1.0, 0.0, -2.0, -2.0, -2.0, 0.0, 1.0, 0.0],
    segments=[1, 1, 1, 2, 2, 2, 2, 3, 3, 0],
    weights=[0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0],
  )
  losses, gradient, metrics = _losses(
    *row, algorithm='gspo', clip_low=0.9, clip_high=9.0
  )
  # (4 * 1)^(1/2) = 2; (0.5 * 0.5 * 2)^(1/3) = 0.5^(1/3); 3.
  root = 0.5 ** (1 / 3)
  wanted = [0, -2, -2, 0, 2 * root, 2 * root, 2 * root, 0, -3, 0]
  np.testing.assert_allclose(losses, wanted, rtol=1e-6)
  # Each token has 1 / length of the gradient of each of length losses.
  np.testing.assert_allclose(gradient, wanted, rtol=1e-6)
  ratios = metrics['ratio'][np.array([1, 2, 4, 5, 6, 8])]
  np.testing.assert_allclose(ratios, [2, 2, root, root, root, 3], rtol=1e-6)


def test_the_divergence_is_schulmans_low_variance_estimate() -> None:
  log_probs, batch = _row([1.0, 1.0], [2.0, 2.0])
  batch['reference_log_probs'] = jnp.array([[-1.5, -0.5]])
  losses, gradient, metrics = _losses(log_probs, batch, kl_weight=0.1)
  # d = -1.5 - -1 and d = -0.5 - -1.
  k3 = [math.exp(-0.5) + 0.5 - 1, math.exp(0.5) - 0.5 - 1]
  np.testing.assert_allclose(metrics['kl'], k3, rtol=1e-6)
  np.testing.assert_allclose(losses, -2 + 0.1 * np.array(k3), rtol=1e-6)
  # d k3 / d new = 1 - exp(d).
  slopes = [1 - math.exp(-0.5), 1 - math.exp(0.5)]
  np.testing.assert_allclose(gradient, -2 + 0.1 * np.array(slopes), rtol=1e-6)


def test_a_divergence_without_weight_is_only_measured() -> None:
  log_probs, batch = _row([1.0], [2.0])
  batch['reference_log_probs'] = jnp.array([[-1.5]])
  losses, _, metrics = _losses(log_probs, batch)
  assert losses[0] == -2
  assert metrics['kl'] > 0


def test_a_divergence_without_a_reference_is_refused() -> None:
  with pytest.raises(ValueError, match='needs reference_log_probs'):
    _losses(*_row([1.0], [1.0]), kl_weight=0.1)


def test_a_target_that_does_not_count_cannot_spoil_the_loss() -> None:
  log_probs, batch = _row([1.0, 1.0], [1.0, 1.0], weights=[1.0, 0.0])
  log_probs = log_probs.at[0, 1].set(-1000.0)
  # exp(1000) is infinite, and 0 times that is not a number.
  batch['old_log_probs'] = jnp.array([[-1.0, -2000.0]])
  batch['reference_log_probs'] = jnp.array([[-1.0, 0.0]])
  losses, gradient, _ = _losses(log_probs, batch, kl_weight=0.1)
  np.testing.assert_array_equal(losses, [-1, 0])
  np.testing.assert_array_equal(gradient, [-1, 0])


def _rollouts(seed: int = 0) -> batches.Rollouts:
  """Five answers of 6 to 11 tokens with their prompts."""
  rng = np.random.default_rng(seed)
  lengths = np.array([3, 1, 6, 4, 2])
  return batches.Rollouts(
    prompts_NP=rng.integers(0, 11, (5, 5)),
    prompt_lengths_N=np.array([4, 5, 5, 2, 4]),
    tokens_NT=rng.integers(0, 11, (5, 6)),
    lengths_N=lengths,
    log_probs_NT=-rng.random((5, 6)) - 1,
    rewards_N=np.zeros(5),
    groups_N=np.zeros(5, np.int64),
    step=0,
  )


def _pack(rollouts: batches.Rollouts, **changes: Any) -> Any:
  """Every batch has the same shape, so that few programs are compiled."""
  options = {
    'sequence_length': 33,
    'num_rows': 5,
    'aggregation': 'sequence',
    'max_completion_tokens': 8,
    'advantages_N': _ADVANTAGES[: rollouts.num_answers],
    **changes,
  }
  return batches.pack(rollouts, **options)


@functools.cache
def _log_probs_fn() -> Any:
  return jax.jit(
    policy_loss.log_probs_fn(_MODEL, temperature=_SAMPLING.temperature)
  )


def _log_probs(rollouts: batches.Rollouts) -> np.ndarray:
  """The model's own [N, T]."""
  found = _log_probs_fn()(tiny.params(_MODEL), _pack(rollouts))
  return batches.unpack(np.asarray(found), rollouts)


def _old_and_reference(rollouts: batches.Rollouts) -> dict[str, Any]:
  """Log-probabilities near the model's; some ratios are clipped."""
  new = _log_probs(rollouts)
  rng = np.random.default_rng(1)
  return {
    'old_log_probs_NT': new + rng.uniform(-0.4, 0.4, new.shape),
    'reference_log_probs_NT': new + rng.uniform(-0.4, 0.4, new.shape),
  }


@functools.cache
def _loss_fn() -> Any:
  """The loss with default settings, of batches that hold everything."""
  loss_fn = policy_loss.loss_fn(_MODEL, _config(), sampling=_SAMPLING)
  params = tiny.params(_MODEL)
  return jax.jit(lambda batch: loss_fn(params, batch, _KEY))


@functools.cache
def _mean_and_gradient(settings: policy_loss.PolicyLossConfig) -> Any:
  loss_fn = policy_loss.loss_fn(_MODEL, settings, sampling=_SAMPLING)

  def mean(params: Any, batch: Any) -> tuple[Any, objectives.Loss]:
    loss = loss_fn(params, batch, _KEY)
    return loss.total / loss.weight, loss

  return jax.jit(jax.value_and_grad(mean, has_aux=True))


def _assert_close(one: Any, other: Any, *, rtol: float) -> None:
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5),
    one,
    other,
  )


@pytest.mark.parametrize(
  ('aggregation', 'wanted'),
  [
    # Answers of one and three tokens with losses [-2.2] and [0.9, 1, 1].
    ('sequence', (-2.2 + 2.9 / 3) / 2),
    ('token', (-2.2 + 2.9) / 4),
    ('constant', (-2.2 + 2.9) / (2 * 5)),
  ],
)
def test_the_loss_is_averaged_as_the_aggregation_says(
  aggregation: Any, wanted: float
) -> None:
  rollouts = batches.Rollouts(
    prompts_NP=np.array([[1, 2], [3, 0]]),
    prompt_lengths_N=np.array([2, 1]),
    tokens_NT=np.array([[4, 0, 0], [5, 6, 7]]),
    lengths_N=np.array([1, 3]),
    log_probs_NT=np.zeros((2, 3)),
    rewards_N=np.zeros(2),
    groups_N=np.zeros(2, np.int64),
    step=0,
  )
  new = _log_probs(rollouts)
  batch = _pack(
    rollouts,
    advantages_N=np.array([2.0, -1.0]),
    aggregation=aggregation,
    max_completion_tokens=5,
    old_log_probs_NT=new - np.log([[1.1, 1, 1], [0.9, 1, 1]]),
    reference_log_probs_NT=new,
  )
  loss = _loss_fn()(batch)
  # Old log-probabilities are float32 numbers of about 2.
  np.testing.assert_allclose(loss.total / loss.weight, wanted, rtol=1e-5)
  assert loss.weight == 4


def _answer_by_answer(params: Any, rollouts: batches.Rollouts) -> jax.Array:
  """Log-probabilities [N, T] from unpacked rows and the stored logits."""
  width = 11
  tokens = np.zeros((5, width), np.int32)
  columns = np.zeros((5, 6), np.int64)
  for n, (prompt, length) in enumerate(
    zip(rollouts.prompt_lengths_N, rollouts.lengths_N, strict=True)
  ):
    tokens[n, :prompt] = rollouts.prompts_NP[n, :prompt]
    tokens[n, prompt : prompt + length] = rollouts.tokens_NT[n, :length]
    # What says token t of the completion is the token before it.
    columns[n] = np.minimum(prompt - 1 + np.arange(6), width - 1)
  logits = transformer.apply(_MODEL, params, jnp.asarray(tokens)).logits
  laws = jax.nn.log_softmax(jnp.asarray(logits) / _SAMPLING.temperature)
  return laws[np.arange(5)[:, None], columns, rollouts.tokens_NT]


@functools.cache
def _answer_by_answer_fn() -> Any:
  return jax.jit(lambda params: _answer_by_answer(params, _rollouts()))


@functools.cache
def _reinforce_gradient_fn() -> Any:
  def surrogate(params: Any, weights_NT: Any) -> jax.Array:
    return -jnp.sum(weights_NT * _answer_by_answer(params, _rollouts()))

  return jax.jit(jax.grad(surrogate))


def test_recomputed_log_probs_are_those_of_each_answer_alone() -> None:
  rollouts = _rollouts()
  alone = _answer_by_answer_fn()(tiny.params(_MODEL))
  wanted = np.where(rollouts.completion_mask_NT, alone, 0)
  # Matrix products of other shapes.
  np.testing.assert_allclose(_log_probs(rollouts), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('algorithm', 'aggregation', 'divisor'),
  [
    # Means over 5 answers of means over their tokens; over 16 tokens; over
    # 5 answers of at most 8 tokens.
    ('grpo', 'sequence', np.array([[3], [1], [6], [4], [2]]) * 5),
    ('gspo', 'sequence', np.array([[3], [1], [6], [4], [2]]) * 5),
    ('grpo', 'token', np.array([[16]])),
    ('grpo', 'constant', np.array([[5 * 8]])),
  ],
)
def test_the_first_update_on_its_data_has_the_gradient_of_reinforce(
  algorithm: Any, aggregation: str, divisor: np.ndarray
) -> None:
  rollouts, params = _rollouts(), tiny.params(_MODEL)
  batch = _pack(rollouts, aggregation=aggregation)
  _, gradient = _mean_and_gradient(_config(algorithm=algorithm))(params, batch)
  weights = rollouts.completion_mask_NT * _ADVANTAGES[:, None] / divisor
  # Sums of float32 in another order.
  _assert_close(gradient, _reinforce_gradient_fn()(params, weights), rtol=1e-3)


@pytest.mark.parametrize('algorithm', ['grpo', 'gspo'])
def test_packed_answers_have_the_loss_and_gradient_of_one_per_row(
  algorithm: Any,
) -> None:
  rollouts, params = _rollouts(), tiny.params(_MODEL)
  mean_and_gradient = _mean_and_gradient(
    _config(algorithm=algorithm, clip_low=0.2, clip_high=0.2, kl_weight=0.1)
  )
  more = _old_and_reference(rollouts)
  packed = _pack(rollouts, **more)
  # No two fit into 11 tokens; then padded to the shape of the others.
  alone = {
    name: np.pad(x, ((0, 0), (0, 22)))
    for name, x in _pack(rollouts, sequence_length=11, **more).items()
  }
  assert packed['segment_ids'].max() > 1
  assert alone['segment_ids'].max() == 1
  found, wanted = (mean_and_gradient(params, x) for x in (packed, alone))
  assert 0 < wanted[0][1].metrics['clip_fraction'] < rollouts.num_tokens
  # Sums of float32 in another order.
  _assert_close(found, wanted, rtol=1e-3)


@pytest.mark.parametrize('aggregation', ['token', 'sequence', 'constant'])
def test_metrics_are_means_over_the_tokens_of_completions(
  aggregation: str,
) -> None:
  rollouts = _rollouts()
  more = _old_and_reference(rollouts)
  loss = _loss_fn()(_pack(rollouts, aggregation=aggregation, **more))
  new = np.asarray(_answer_by_answer_fn()(tiny.params(_MODEL)))
  ratio = np.exp(new - more['old_log_probs_NT'])
  distance = more['reference_log_probs_NT'] - new
  up, down = _ADVANTAGES[:, None] > 0, _ADVANTAGES[:, None] < 0
  wanted = {
    'ratio': ratio,
    'clip_fraction': (ratio > 1.2) & up | (ratio < 0.8) & down,
    'kl': np.exp(distance) - distance - 1,
    'rollout_gap': np.abs(new - rollouts.log_probs_NT),
  }
  assert set(loss.metrics) == {*wanted, 'entropy'}
  assert loss.weight == rollouts.num_tokens
  for name, values in wanted.items():
    np.testing.assert_allclose(
      loss.metrics[name] / loss.weight,
      values[rollouts.completion_mask_NT].mean(),
      rtol=1e-4,
    )


def test_the_entropy_is_that_of_the_law_of_the_next_token() -> None:
  rollouts, params = _rollouts(), tiny.params(_MODEL)
  batch = _pack(rollouts, **_old_and_reference(rollouts))
  loss = _loss_fn()(batch)
  apply = jax.jit(functools.partial(transformer.apply, _MODEL))
  logits = apply(
    params,
    batch['tokens'],
    positions_BT=batch['positions'],
    segment_ids_BT=batch['segment_ids'],
  ).logits
  probs = np.asarray(jax.nn.softmax(logits / 0.7))
  entropy = -(probs * np.log(probs)).sum(-1)[batch['loss_weights'] > 0]
  np.testing.assert_allclose(
    loss.metrics['entropy'] / loss.weight, entropy.mean(), rtol=1e-5
  )


def test_there_is_no_gap_to_the_models_own_rollouts() -> None:
  lengths = np.array([4, 2, 3])
  prompts = np.random.default_rng(2).integers(0, 11, (3, 4), np.int32)
  drawn = sampling.generate(
    _MODEL,
    tiny.params(_MODEL),
    jnp.asarray(prompts),
    jnp.asarray(lengths),
    _SAMPLING,
    _KEY,
  )
  log_probs = np.asarray(drawn.log_probs)
  rollouts = batches.Rollouts(
    prompts_NP=prompts,
    prompt_lengths_N=lengths,
    tokens_NT=np.asarray(drawn.tokens),
    lengths_N=np.asarray(drawn.lengths),
    log_probs_NT=log_probs,
    rewards_N=np.zeros(3),
    groups_N=np.zeros(3, np.int64),
    step=0,
  )
  loss = _loss_fn()(
    _pack(
      rollouts, old_log_probs_NT=log_probs, reference_log_probs_NT=log_probs
    )
  )
  # Rounding: the sampler reads a cache.
  assert loss.metrics['rollout_gap'] / loss.weight < 1e-5


def test_blocks_of_logits_give_the_loss_and_gradient_of_the_whole(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  rollouts, params = _rollouts(), tiny.params(_MODEL)
  batch = _pack(rollouts, **_old_and_reference(rollouts))
  settings = _config(clip_low=0.2, clip_high=0.2, kl_weight=0.1)
  whole = _mean_and_gradient(settings)(params, batch)
  # 33 positions, of which 11 may be alive.
  monkeypatch.setattr(objectives, 'LOGITS_BYTES', 5 * 11 * 11 * 4)
  blocks = _mean_and_gradient.__wrapped__(settings)(params, batch)
  # Sums of float32 in another order.
  _assert_close(blocks, whole, rtol=1e-4)


@pytest.mark.parametrize('num_positions', [1, 3])
def test_logits_in_blocks_are_never_stored_whole(
  num_positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  batch = _pack(_rollouts())
  monkeypatch.setattr(objectives, 'LOGITS_BYTES', 5 * num_positions * 11 * 4)
  gradient = _mean_and_gradient.__wrapped__(_config())
  text = str(jax.make_jaxpr(gradient)(tiny.params(_MODEL), batch))
  assert f'f32[5,{num_positions},11]' in text
  # Neither in one piece nor as the blocks of a scan.
  assert 'f32[5,33,11]' not in text
  assert f'f32[{33 // num_positions},5,{num_positions},11]' not in text


def test_blocks_are_counted_in_rows_of_one_device(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  params, batch = tiny.params(_MODEL), _pack(_rollouts(), num_rows=8)
  monkeypatch.setattr(objectives, 'LOGITS_BYTES', 2 * 3 * 11 * 4)
  gradient = _mean_and_gradient.__wrapped__(_config())
  mesh = jax.sharding.AbstractMesh(
    (1, 2, 2, 2),
    sharding.MESH_AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 4,
  )
  with jax.sharding.use_abstract_mesh(mesh):
    text = str(jax.make_jaxpr(gradient)(params, batch))
  # Eight rows on four devices that share them, so two rows by three positions.
  assert 'f32[8,3,11]' in text
  assert 'f32[8,1,11]' not in text


def test_the_loss_of_parts_adds_up_to_the_loss_of_the_whole() -> None:
  rollouts = _rollouts()
  batch = _pack(rollouts, **_old_and_reference(rollouts))
  parts = [
    _loss_fn()(
      {name: np.where(rows[:, None], x, 0) for name, x in batch.items()}
    )
    for rows in (np.arange(5) < 1, np.arange(5) >= 1)
  ]
  assert all(part.weight > 0 for part in parts)
  # Sums of float32 in another order.
  _assert_close(jax.tree.map(jnp.add, *parts), _loss_fn()(batch), rtol=1e-4)


@pytest.mark.parametrize(
  ('algorithm', 'aggregation'),
  [
    ('grpo', 'sequence'),
    ('dr_grpo', 'constant'),
    ('dapo', 'token'),
    ('gspo', 'sequence'),
  ],
)
def test_each_algorithm_has_its_aggregation(
  algorithm: Any, aggregation: str
) -> None:
  assert _config(algorithm=algorithm).resolved_aggregation == aggregation
  changed = _config(algorithm=algorithm, aggregation='token')
  assert changed.resolved_aggregation == 'token'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'algorithm': 'ppo'}, "policy.algorithm='ppo' must be one of grpo"),
    ({'aggregation': 'mean'}, "policy.aggregation='mean' must be one of token"),
    ({'clip_low': 0.0}, 'policy.clip_low=0.0 must be in'),
    ({'clip_low': 1.5}, 'policy.clip_low=1.5 must be in'),
    ({'clip_high': 0.0}, 'policy.clip_high=0.0 must be above 0'),
    ({'clip_high': float('nan')}, 'policy.clip_high=nan must be above 0'),
    ({'dual_clip': 1.0}, 'policy.dual_clip=1.0 must be above 1'),
    ({'kl_weight': -0.1}, 'policy.kl_weight=-0.1 must be 0 or more'),
    ({'kl_weight': float('inf')}, 'policy.kl_weight=inf must be 0 or more'),
  ],
)
def test_a_setting_out_of_range_is_refused(
  changes: dict[str, Any], message: str
) -> None:
  with pytest.raises(ValueError, match=message):
    policy_loss.loss_fn(_MODEL, _config(**changes), sampling=_SAMPLING)


def test_a_greedy_sampler_is_refused() -> None:
  greedy = sampling.SamplingConfig(temperature=0)
  with pytest.raises(ValueError, match='temperature=0 must be above 0'):
    policy_loss.loss_fn(_MODEL, _config(), sampling=greedy)
  with pytest.raises(ValueError, match='temperature=0 must be above 0'):
    policy_loss.log_probs_fn(_MODEL, temperature=0)
