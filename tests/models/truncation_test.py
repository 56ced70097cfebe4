"""Temperature, top-k and top-p: `sampling.truncate`."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from efficient_llm.models import sampling

# Ties are common, and what is no tie differs by more than float32 rounding.
_LOGITS = npst.arrays(
  np.float32,
  (7,),
  elements=st.one_of(
    st.integers(-3, 3).map(float),
    st.integers(-1920, 1920).map(lambda number: number / 64),
  ),
)
_PROPERTY = hypothesis.settings(max_examples=60)


def _softmax(logits: np.ndarray) -> np.ndarray:
  exps = np.exp(logits - logits.max())
  return exps / exps.sum()


def _expected(
  logits: np.ndarray, config: sampling.SamplingConfig
) -> np.ndarray:
  """The same distribution by sorting and counting, in float64."""
  probs = _softmax(logits.astype(np.float64) / config.temperature)
  if config.top_k is not None:
    kth = sorted(probs, reverse=True)[min(config.top_k, len(probs)) - 1]
    probs = np.where(probs < kth, 0, probs)
    probs /= probs.sum()
  if config.top_p is not None:
    reached, kept = 0.0, 0.0
    for prob in sorted(probs, reverse=True):
      # A total within rounding of top_p could fall on either side.
      hypothesis.assume(abs(reached - config.top_p) > 1e-5)
      if reached < config.top_p:
        kept = prob
      reached += prob
    probs = np.where(probs < kept * (1 - 1e-12), 0, probs)
    probs /= probs.sum()
  return probs


@_PROPERTY
@hypothesis.given(
  _LOGITS,
  st.floats(0.1, 10),
  st.none() | st.integers(1, 9),
  st.none() | st.floats(0.01, 0.99),
)
def test_truncation_equals_sorting_and_counting(
  logits: np.ndarray,
  temperature: float,
  top_k: int | None,
  top_p: float | None,
) -> None:
  config = sampling.SamplingConfig(
    temperature=temperature, top_k=top_k, top_p=top_p
  )
  expected = _expected(logits, config)
  log_probs = np.asarray(sampling.truncate(jnp.asarray(logits), config))
  # Logits of up to 300 after temperature have 3e-5 of float32 rounding.
  np.testing.assert_allclose(np.exp(log_probs), expected, atol=1e-4)


@_PROPERTY
@hypothesis.given(_LOGITS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_sufficient_set(
  logits: np.ndarray, top_p: float
) -> None:
  config = sampling.SamplingConfig(top_p=top_p)
  kept = np.isfinite(sampling.truncate(jnp.asarray(logits), config))
  probs = _softmax(logits.astype(np.float64))
  assert probs[kept].sum() >= top_p - 1e-5
  # Without the least likely kept tokens (equals count as one) it is too small.
  likelier = probs > probs[kept].min() * (1 + 1e-6)
  assert probs[likelier].sum() <= top_p + 1e-5
  assert probs[~kept].max(initial=0) <= probs[kept].min()


@pytest.mark.parametrize(
  ('top_p', 'num_kept'),
  [(0.4999, 1), (0.5001, 2), (0.7999, 2), (0.8001, 3)],
)
def test_a_token_joins_when_those_before_fall_short(
  top_p: float, num_kept: int
) -> None:
  logits = jnp.log(jnp.array([0.3, 0.5, 0.2]))
  log_probs = sampling.truncate(logits, sampling.SamplingConfig(top_p=top_p))
  assert jnp.isfinite(log_probs).sum() == num_kept


@_PROPERTY
@hypothesis.given(_LOGITS)
def test_temperature_zero_is_the_first_of_the_likeliest(
  logits: np.ndarray,
) -> None:
  config = sampling.SamplingConfig(temperature=0)
  log_probs = np.asarray(sampling.truncate(jnp.asarray(logits), config))
  assert log_probs[logits.argmax()] == 0
  assert np.isneginf(np.delete(log_probs, logits.argmax())).all()


@_PROPERTY
@hypothesis.given(_LOGITS, st.integers(1, 9))
def test_equals_of_the_last_kept_token_are_kept_too(
  logits: np.ndarray, top_k: int
) -> None:
  config = sampling.SamplingConfig(top_k=top_k)
  kept = np.isfinite(sampling.truncate(jnp.asarray(logits), config))
  assert kept.sum() >= min(top_k, 7)
  assert (kept == (logits >= logits[kept].min())).all()
