import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from efficient_llm.models import attention


def _inputs(num_tokens: int, *, head_dim: int) -> list[jax.Array]:
  """Queries of four heads, keys and values of two."""
  keys = jax.random.split(jax.random.key(0), 3)
  return [
    jax.random.normal(key, (2, num_tokens, heads, head_dim))
    for key, heads in zip(keys, (4, 2, 2), strict=True)
  ]


@pytest.mark.parametrize(
  ('platform', 'expected'),
  [('cpu', 'xla'), ('gpu', 'cudnn'), ('tpu', 'splash'), ('metal', 'xla')],
)
def test_auto_goes_by_platform(platform: str, expected: str) -> None:
  assert attention.choose('auto', platform) == expected


def test_a_chosen_implementation_stays_chosen() -> None:
  assert attention.choose('xla', 'tpu') == 'xla'


@pytest.mark.parametrize('implementation', ['cudnn', 'splash'])
def test_what_a_kernel_cannot_do_goes_to_xla(
  implementation: attention.Implementation,
) -> None:
  inputs = _inputs(6, head_dim=4)
  mask = attention.Mask()
  np.testing.assert_array_equal(
    attention.attend(*inputs, mask=mask, implementation=implementation),
    attention.attend(*inputs, mask=mask, implementation='xla'),
  )


@pytest.fixture
def _interpreted_splash(monkeypatch: pytest.MonkeyPatch) -> None:
  """Runs the TPU kernel on this machine."""
  make = splash_attention.make_splash_mha_single_device
  monkeypatch.setattr(
    splash_attention,
    'make_splash_mha_single_device',
    functools.partial(make, interpret=True),
  )


@pytest.mark.usefixtures('_interpreted_splash')
@pytest.mark.parametrize(
  ('causal', 'packed'), [(True, True), (True, False), (False, True)]
)
def test_splash_gives_what_xla_gives(causal: bool, packed: bool) -> None:
  ids_BT = jnp.arange(128) // 50 + jnp.array([[1], [2]])
  mask = attention.Mask(
    causal=causal, segment_ids_BT=ids_BT if packed else None
  )

  @functools.partial(jax.jit, static_argnums=0)
  def attend(implementation: Any, inputs: list[jax.Array]) -> jax.Array:
    return attention.attend(*inputs, mask=mask, implementation=implementation)

  inputs = _inputs(128, head_dim=128)
  # Blocks add up in another order.
  np.testing.assert_allclose(
    attend('splash', inputs), attend('xla', inputs), atol=2e-5
  )


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('num_tokens', [128, 131])
def test_halved_causal_attention_gives_what_the_whole_matrix_gives(
  num_tokens: int, packed: bool
) -> None:
  ids_BT = jnp.arange(num_tokens) // 50 + jnp.array([[1], [2]])
  mask = attention.Mask(segment_ids_BT=ids_BT if packed else None)
  seen = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))[None]
  if packed:
    seen &= ids_BT[:, :, None] == ids_BT[:, None]

  def halved(inputs: list[jax.Array]) -> jax.Array:
    return attention.attend(*inputs, mask=mask, implementation='xla')

  def whole(inputs: list[jax.Array]) -> jax.Array:
    q_BTNH, k_BSKH, v_BSKH = inputs
    k_BSNH, v_BSNH = (jnp.repeat(x, 2, axis=2) for x in (k_BSKH, v_BSKH))
    scores = jnp.einsum('btnh,bsnh->bnts', q_BTNH, k_BSNH) * 16**-0.5
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    return jnp.einsum('bnts,bsnh->btnh', jax.nn.softmax(scores), v_BSNH)

  def loss(attend: Any, inputs: list[jax.Array]) -> jax.Array:
    return (attend(inputs) ** 2).sum()

  inputs = _inputs(num_tokens, head_dim=16)
  np.testing.assert_allclose(halved(inputs), whole(inputs), atol=2e-6)
  gradients = [
    jax.grad(functools.partial(loss, f))(inputs) for f in (halved, whole)
  ]
  for ours, reference in zip(*gradients, strict=True):
    np.testing.assert_allclose(ours, reference, atol=2e-5)
