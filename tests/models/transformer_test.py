import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import decoding, transformer
from tests.models import architectures

ALL = pytest.mark.parametrize('name', architectures.ARCHITECTURES)
# Float32 rounding through two layers, in logits of size about 3.
ROUNDING = 2e-5


def _logits(name: str, tokens_BT: np.ndarray, **inputs: Any) -> np.ndarray:
  config = architectures.ARCHITECTURES[name]
  params = architectures.params(name)
  output = architectures.forward(config, params, tokens_BT, **inputs)
  return np.asarray(output.logits)


def test_a_causal_model_has_no_gradient_from_the_future() -> None:
  gradient_TT = architectures.influence('llama', 6)
  np.testing.assert_array_equal(gradient_TT != 0, np.tri(6, dtype=bool))


def test_a_bidirectional_model_sees_both_sides() -> None:
  assert (architectures.influence('bert', 6) != 0).all()


@ALL
def test_no_gradient_crosses_from_one_packed_document_to_another(
  name: str,
) -> None:
  ids_T = np.array([1, 1, 1, 2, 2, 0, 0], np.int32)
  gradient_TT = architectures.influence(name, 7, segment_ids_BT=ids_T[None])
  expected_TT = ids_T[:, None] == ids_T[None]
  if architectures.ARCHITECTURES[name].causal:
    expected_TT &= np.tri(7, dtype=bool)
  np.testing.assert_array_equal(gradient_TT != 0, expected_TT)


_PACKED_IDS = np.array([[1] * 4 + [2] * 4 + [0] * 2], np.int32)
_PACKED_POSITIONS = np.array([[*range(4), *range(4), 0, 0]], np.int32)


@ALL
def test_packed_documents_give_what_each_gives_alone(name: str) -> None:
  documents_BT = architectures.tokens(2, 4)
  packed_BT = np.zeros((1, 10), np.int32)
  packed_BT[0, :8] = documents_BT.ravel()
  packed = _logits(
    name,
    packed_BT,
    segment_ids_BT=_PACKED_IDS,
    positions_BT=_PACKED_POSITIONS,
  )
  alone = _logits(name, documents_BT)
  np.testing.assert_allclose(
    packed[0, :8].reshape(alone.shape), alone, atol=ROUNDING
  )


@ALL
def test_padding_changes_nothing_elsewhere(name: str) -> None:
  packing = {
    'segment_ids_BT': _PACKED_IDS,
    'positions_BT': _PACKED_POSITIONS,
  }
  tokens_BT = architectures.tokens(1, 10)
  other_BT = tokens_BT.copy()
  other_BT[:, 8:] = (other_BT[:, 8:] + 5) % 37
  np.testing.assert_array_equal(
    _logits(name, tokens_BT, **packing)[:, :8],
    _logits(name, other_BT, **packing)[:, :8],
  )


def test_positions_count_from_zero_by_default() -> None:
  tokens_BT = architectures.tokens(2, 4)
  positions_BT = np.tile(np.arange(4, dtype=np.int32), (2, 1))
  np.testing.assert_allclose(
    _logits('gpt2', tokens_BT),
    _logits('gpt2', tokens_BT, positions_BT=positions_BT),
    atol=ROUNDING,
  )


def test_token_types_are_zero_by_default_and_matter() -> None:
  tokens_BT = architectures.tokens(2, 4)
  default = _logits('bert', tokens_BT)
  zeros = _logits('bert', tokens_BT, token_types_BT=np.zeros((2, 4), np.int32))
  ones = _logits('bert', tokens_BT, token_types_BT=np.ones((2, 4), np.int32))
  np.testing.assert_allclose(default, zeros, atol=ROUNDING)
  assert abs(ones - zeros).max() > 0.1


@pytest.mark.parametrize('name', ['llama', 'bert'])
def test_unstacked_layers_give_the_same_logits(name: str) -> None:
  tokens_BT = architectures.tokens(2, 4)
  params = transformer.unstack_layers(architectures.params(name))
  unstacked = architectures.forward(
    architectures.ARCHITECTURES[name], params, tokens_BT
  )
  assert isinstance(params['layers'], tuple)
  np.testing.assert_allclose(
    unstacked.logits, _logits(name, tokens_BT), atol=ROUNDING
  )


def test_unstacked_layers_are_not_unstacked_again() -> None:
  params = transformer.unstack_layers(architectures.params('llama'))
  assert transformer.unstack_layers(params) is params


@pytest.mark.parametrize('name', architectures.DECODERS)
def test_params_for_decoding_give_the_same_logits(name: str) -> None:
  config = architectures.ARCHITECTURES[name]
  tokens_BT = architectures.tokens(2, 4)
  params = decoding.prepare(config, architectures.params(name))
  joined = architectures.forward(config, params, tokens_BT)
  np.testing.assert_allclose(
    joined.logits, _logits(name, tokens_BT), atol=ROUNDING
  )
  again = decoding.prepare(config, params)
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, params)))


def test_params_for_decoding_have_the_type_of_the_activations() -> None:
  config = architectures.ARCHITECTURES['llama']
  half = dataclasses.replace(config, dtype='bfloat16')
  params = decoding.prepare(half, architectures.params('llama'))
  types = {x.dtype for x in jax.tree.leaves(params) if x.ndim > 1}
  assert types == {jnp.dtype('bfloat16')}


@jax.jit
def _loss(logits_BTV: jax.Array) -> jax.Array:
  return jax.nn.log_softmax(logits_BTV)[..., 0].mean()


def _gradient(**changes: Any) -> Any:
  config = dataclasses.replace(architectures.ARCHITECTURES['llama'], **changes)

  def loss(params: Any) -> jax.Array:
    tokens_BT = jnp.asarray(architectures.tokens(2, 4))
    output = transformer.apply(config, params, tokens_BT)
    assert output.logits is not None
    return _loss(output.logits)

  return jax.jit(jax.grad(loss))(architectures.params('llama'))


@pytest.fixture(scope='module')
def plain_gradient() -> Any:
  return _gradient()


@pytest.mark.parametrize(
  'changes',
  [{'remat': 'dots'}, {'remat': 'full'}, {'scan_unroll': 2}],
  ids=str,
)
def test_memory_settings_leave_the_gradient_alone(
  changes: dict[str, Any], plain_gradient: Any
) -> None:
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
    _gradient(**changes),
    plain_gradient,
  )


@pytest.mark.parametrize('name', ['llama', 'bert'])
def test_bfloat16_stays_close_to_float32(name: str) -> None:
  tokens_BT = architectures.tokens(2, 4)
  config = dataclasses.replace(
    architectures.ARCHITECTURES[name], dtype='bfloat16'
  )
  output = architectures.forward(config, architectures.params(name), tokens_BT)
  assert output.logits is not None
  assert output.logits.dtype == np.float32
  exact = _logits(name, tokens_BT)
  # 8 bits of mantissa are 0.4 % a step, over about ten steps in sequence.
  error = np.linalg.norm(output.logits - exact) / np.linalg.norm(exact)
  assert 0 < error < 0.04


def test_logits_can_be_computed_later_for_chosen_positions() -> None:
  config = architectures.ARCHITECTURES['bert']
  params = architectures.params('bert')
  tokens_BT = architectures.tokens(2, 4)
  hidden_BTD = architectures.forward(config, params, tokens_BT).hidden
  chosen = transformer.unembed(config, params, hidden_BTD[:, 2])
  np.testing.assert_allclose(
    chosen, _logits('bert', tokens_BT)[:, 2], atol=ROUNDING
  )


def _apply_shape(name: str, num_tokens: int, **inputs: Any) -> None:
  config = architectures.ARCHITECTURES[name]
  jax.eval_shape(
    lambda params, tokens_BT, inputs: transformer.apply(
      config, params, tokens_BT, **inputs
    ),
    architectures.params(name),
    np.zeros((1, num_tokens), np.int32),
    inputs,
  )


def test_logits_are_left_out_where_not_wanted() -> None:
  config = architectures.ARCHITECTURES['bert']
  output = jax.eval_shape(
    lambda params, tokens_BT: transformer.apply(
      config, params, tokens_BT, with_logits=False
    ),
    architectures.params('bert'),
    np.zeros((1, 4), np.int32),
  )
  assert output.logits is None


def test_a_sequence_longer_than_the_positions_is_refused() -> None:
  with pytest.raises(ValueError, match=r'^33 tokens exceed the 32 positions'):
    _apply_shape('llama', 33)


def test_a_sequence_longer_than_the_cache_is_refused() -> None:
  config = architectures.ARCHITECTURES['llama']
  cache = transformer.empty_cache(config, batch_size=1, capacity=5)
  with pytest.raises(ValueError, match=r'^6 tokens exceed the 5 positions'):
    _apply_shape('llama', 6, cache=cache)


def test_inputs_that_would_be_ignored_are_refused() -> None:
  config = architectures.ARCHITECTURES['llama']
  ones = np.ones((1, 4), np.int32)
  with pytest.raises(ValueError, match='token_types_BT needs'):
    _apply_shape('llama', 4, token_types_BT=ones)
  with pytest.raises(ValueError, match='num_new_B needs a cache'):
    _apply_shape('llama', 4, num_new_B=ones[:, 0])
  with pytest.raises(ValueError, match='tail_mask_BTT needs a cache'):
    _apply_shape('llama', 4, tail_mask_BTT=np.ones((1, 4, 4), bool))
  cache = transformer.empty_cache(config, batch_size=1, capacity=8)
  with pytest.raises(ValueError, match='segment_ids_BT does not go with'):
    _apply_shape('llama', 4, segment_ids_BT=ones, cache=cache)
