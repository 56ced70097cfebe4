import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from efficient_llm.kernels.tree_attention import api, reference
from efficient_llm.models import attention, kv_cache


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


@pytest.mark.parametrize(
  ('num_tokens', 'packed'),
  [pytest.param(128, True, marks=pytest.mark.slow), (131, False)],
)
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
  for ours, other in zip(*gradients, strict=True):
    np.testing.assert_allclose(ours, other, atol=2e-5)


def _behind_a_cache(
  num_tokens: int, dtype: str, *, tail: bool
) -> tuple[list[jax.Array], attention.Mask, list[jax.Array]]:
  """Inputs of `attend`, the mask, and what the specification wants."""
  capacity, head_dim = 128, 64
  keys = jax.random.split(jax.random.key(1), 3)
  shapes = [(2, num_tokens, 4, head_dim), *[(2, 2, capacity, head_dim)] * 2]
  q, k, v = (
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  )
  lengths = jnp.asarray([3, 40])
  causal = jnp.broadcast_to(
    jnp.tri(num_tokens, dtype=bool), (2, num_tokens, num_tokens)
  )
  # A tree in which the third token does not see the second.
  seen = causal.at[:, 2, 1].set(False) if tail else causal
  mask = attention.make_mask(
    causal=True,
    num_tokens=num_tokens,
    segment_ids_BT=None,
    cache=kv_cache.KVCache((k,), (v,), lengths),
    tail_mask_BTT=seen if tail else None,
  )
  wanted = [q, k, v, lengths, api.pack(seen)]
  return [q, k.swapaxes(1, 2), v.swapaxes(1, 2)], mask, wanted


@pytest.mark.parametrize('tail', [True, False])
def test_behind_a_cache_attention_is_what_the_kernels_specify(
  tail: bool,
) -> None:
  inputs, mask, wanted = _behind_a_cache(5, 'float32', tail=tail)
  np.testing.assert_allclose(
    attention.attend(*inputs, mask=mask),
    reference.attend(*wanted),
    rtol=0,
    atol=1e-5,
  )


class _Hopper(NamedTuple):
  platform: str = 'gpu'
  device_kind: str = 'NVIDIA H200'


@pytest.mark.parametrize(
  ('num_tokens', 'dtype', 'implementation', 'kernel'),
  [
    (5, 'bfloat16', 'auto', 'pallas_gpu'),
    (64, 'bfloat16', 'auto', 'pallas_gpu'),
    (65, 'bfloat16', 'auto', None),
    (5, 'float32', 'auto', None),
    (5, 'bfloat16', 'xla', None),
    (5, 'bfloat16', 'pallas_tpu', 'pallas_tpu'),
  ],
)
def test_a_few_tokens_behind_a_cache_are_the_kernels(
  monkeypatch: pytest.MonkeyPatch,
  num_tokens: int,
  dtype: str,
  implementation: attention.Implementation,
  kernel: str | None,
) -> None:
  used = []

  def attend(*arrays: jax.Array, implementation: str, spec: Any) -> jax.Array:
    used.append(implementation)
    assert spec is None
    for one, other in zip(arrays, wanted, strict=True):
      np.testing.assert_array_equal(one, other)
    return reference.attend(*arrays)

  inputs, mask, wanted = _behind_a_cache(num_tokens, dtype, tail=True)
  monkeypatch.setattr(api, 'attend', attend)
  monkeypatch.setattr(jax, 'devices', lambda: [_Hopper()])
  attention.attend(*inputs, mask=mask, implementation=implementation)
  assert used == ([kernel] if kernel else [])
