"""Token sampling: the draws of jax.random, and who makes them."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm.kernels.speculative_sampling import (
  api,
  gumbel,
  pallas_tpu,
  reference,
)
from efficient_llm.typing import Array
from tests.kernels import interpreter

no_race = interpreter.no_race
STRICT = interpreter.STRICT


def _key_data(seed: int, num_rows: int) -> Array:
  return jax.random.key_data(jax.random.split(jax.random.key(seed), num_rows))


def _logits(*shape: int, seed: int = 0, dtype: str = 'float32') -> Array:
  logits = 3 * jax.random.normal(jax.random.key(seed), shape)
  return logits.astype(dtype)


@hypothesis.given(seed=st.integers(0, 2**32 - 1), size=st.just(999))
def test_the_bits_are_those_of_jax_random(seed: int, size: int) -> None:
  key = jax.random.key(seed)
  first, second = jax.random.key_data(key).view(jnp.int32)
  ours = gumbel.bits(first, second, jnp.arange(size, dtype=jnp.int32))
  assert (ours.view(jnp.uint32) == jax.random.bits(key, (size,))).all()


def test_every_version_of_jax_draws_the_same() -> None:
  # Made by jax.random.bits(jax.random.key(7), (4,)) with jax 0.10.2 and 0.12.
  golden = [2895194379, 4185947648, 1300703658, 1906787632]
  key = jax.random.key(7)
  first, second = jax.random.key_data(key).view(jnp.int32)
  ours = gumbel.bits(first, second, jnp.arange(4, dtype=jnp.int32))
  assert ours.view(jnp.uint32).tolist() == golden
  assert jax.random.bits(key, (4,)).tolist() == golden


def test_the_noise_is_that_of_jax_random() -> None:
  key = jax.random.key(3)
  first, second = jax.random.key_data(key).view(jnp.int32)
  ours = gumbel.noise(first, second, jnp.arange(10_000, dtype=jnp.int32))
  # One bit of a logarithm is what programs compiled apart may differ by.
  np.testing.assert_allclose(
    ours, jax.random.gumbel(key, (10_000,)), rtol=3e-7, atol=1e-7
  )


@pytest.mark.usefixtures('no_race')
@pytest.mark.parametrize(
  ('num_rows', 'vocab_size', 'dtype', 'temperature'),
  [
    (1, 7, 'float32', 0.3),
    (3, 512, 'float32', 1.0),
    (17, 1025, 'float32', 0.7),
    (9, 777, 'bfloat16', 2.5),
  ],
)
def test_the_kernel_draws_what_jax_random_draws(
  num_rows: int, vocab_size: int, dtype: str, temperature: float
) -> None:
  logits_RV = _logits(num_rows, vocab_size, dtype=dtype)
  keys_R2 = _key_data(1, num_rows)
  drawn_R = jax.vmap(jax.random.categorical)(
    jax.random.wrap_key_data(keys_R2),
    logits_RV.astype(jnp.float32) / temperature,
  )
  tokens_R = pallas_tpu.sample_tokens(
    logits_RV, keys_R2, temperature=temperature, columns=256, interpret=STRICT
  )
  assert tokens_R.tolist() == drawn_R.tolist()
  xla_R = reference.sample_tokens(logits_RV, keys_R2, temperature=temperature)
  assert xla_R.tolist() == drawn_R.tolist()


@pytest.mark.usefixtures('no_race')
def test_temperature_0_takes_the_first_of_equals() -> None:
  logits_RV = np.zeros((2, 600), np.float32)
  logits_RV[0, [300, 301, 599]] = 2.0
  tokens_R = pallas_tpu.sample_tokens(
    jnp.asarray(logits_RV),
    _key_data(0, 2),
    temperature=0,
    columns=128,
    interpret=STRICT,
  )
  assert tokens_R.tolist() == [300, 0]


@pytest.mark.usefixtures('no_race')
def test_an_excluded_token_is_never_drawn() -> None:
  allowed_V = np.arange(300) % 97 == 96
  logits_RV = jnp.where(allowed_V, _logits(40, 300), -jnp.inf)
  tokens_R = pallas_tpu.sample_tokens(
    logits_RV, _key_data(5, 40), temperature=1.0, columns=128, interpret=STRICT
  )
  assert allowed_V[np.asarray(tokens_R)].all()
  assert len(set(tokens_R.tolist())) > 1


@pytest.mark.parametrize(
  ('device', 'shape', 'dtype', 'implementation', 'word'),
  [
    (('cpu', 'cpu'), (4, 100), 'float32', 'xla', 'cpu'),
    (('tpu', 'TPU v5 lite'), (4, 100), 'float32', 'pallas_tpu', 'tpu'),
    (('tpu', 'TPU v5 lite'), (4, 100), 'float16', 'xla', 'float16'),
    (('tpu', 'TPU v5 lite'), (4, 65, 100), 'float32', 'xla', '65'),
    (('gpu', 'NVIDIA H200'), (4, 5, 5000), 'float32', 'pallas_gpu', 'gpu'),
    (('gpu', 'NVIDIA H200'), (4, 5, 500), 'float32', 'xla', '500'),
    (('gpu', 'NVIDIA L4'), (4, 5, 5000), 'float32', 'xla', 'L4'),
  ],
)
def test_the_choice_says_why(
  device: tuple[str, str],
  shape: tuple[int, ...],
  dtype: str,
  implementation: str,
  word: str,
) -> None:
  platform, kind = device
  logits = jax.ShapeDtypeStruct(shape, dtype)
  choice = api.choose(logits, platform=platform, device_kind=kind)
  assert choice.implementation == implementation
  assert word in choice.reason


def test_other_noise_than_the_kernels_leaves_the_choice_to_xla() -> None:
  logits = jax.ShapeDtypeStruct((4, 100), 'float32')
  with jax.threefry_partitionable(False):
    choice = api.choose(logits, platform='tpu')
  assert choice.implementation == 'xla'
  assert 'jax_threefry_partitionable' in choice.reason


def test_wrong_arguments_are_refused() -> None:
  logits_RV, keys_R2 = _logits(3, 100), _key_data(0, 3)
  with pytest.raises(ValueError, match='temperature=-1'):
    api.sample_tokens(logits_RV, keys_R2, temperature=-1)
  with pytest.raises(ValueError, match='not float16; leave it None'):
    api.sample_tokens(
      logits_RV.astype(jnp.float16),
      keys_R2,
      temperature=1.0,
      implementation='pallas_tpu',
    )
