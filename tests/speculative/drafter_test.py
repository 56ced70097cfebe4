"""Tests of the draft model: what it reads, what it must not see, its cache."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import kv_cache, transformer
from efficient_llm.speculative import drafter
from tests import tiny

_ROTARY = tiny.SMALL_VOCAB
_MODELS = {
  'rotary': _ROTARY,
  'grouped heads with norms': dataclasses.replace(
    _ROTARY, num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True
  ),
  'learned positions': dataclasses.replace(
    _ROTARY,
    positions='learned',
    norm='layer',
    gated=False,
    bias=True,
    qkv_bias=True,
  ),
  'post-norm': dataclasses.replace(_ROTARY, norm_placement='post'),
  'untied': dataclasses.replace(_ROTARY, tie_embeddings=False, num_layers=2),
}
_NUM_TOKENS = 10

each_model = pytest.mark.parametrize('model', _MODELS.values(), ids=_MODELS)


@functools.cache
def _params(model: transformer.TransformerConfig) -> Any:
  """Those of the drafter, which starts at random."""
  make = jax.jit(drafter.init, static_argnums=0)
  return make(model, jax.random.key(1))


@functools.cache
def _pairs(
  model: transformer.TransformerConfig,
) -> tuple[jax.Array, jax.Array]:
  """Tokens and features."""
  rng = np.random.default_rng(2)
  shape = (3, _NUM_TOKENS)
  tokens = rng.integers(0, model.vocab_size, shape, np.int32)
  hidden = rng.normal(size=(*shape, model.embed_dim)).astype(np.float32)
  return jnp.asarray(tokens), jnp.asarray(hidden)


def _forward(
  model: transformer.TransformerConfig,
  tokens: jax.Array,
  hidden: jax.Array,
  **more: Any,
) -> tuple[jax.Array, Any]:
  call = jax.jit(drafter.forward, static_argnums=0)
  return call(model, _params(model), tiny.params(model), tokens, hidden, **more)


def _assert_close(found: jax.Array, wanted: jax.Array) -> None:
  # Products of other shapes round differently.
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@functools.cache
def _stepped(
  model: transformer.TransformerConfig,
) -> tuple[jax.Array, kv_cache.KVCache]:
  """Features and cache of one position after the other."""
  tokens, hidden = _pairs(model)
  cache = drafter.empty_cache(model, len(tokens), _NUM_TOKENS)
  features = []
  for t in range(_NUM_TOKENS):
    here = slice(t, t + 1)
    feature, cache = _forward(
      model, tokens[:, here], hidden[:, here], cache=cache
    )
    features.append(feature)
  return jnp.concatenate(features, 1), cache


@each_model
def test_steps_with_a_cache_give_what_a_whole_pass_gives(
  model: transformer.TransformerConfig,
) -> None:
  whole, _ = _forward(model, *_pairs(model))
  stepped, cache = _stepped(model)
  _assert_close(stepped, whole)
  np.testing.assert_array_equal(cache.lengths_B, _NUM_TOKENS)


@each_model
def test_a_rebuilt_cache_holds_what_stepping_wrote(
  model: transformer.TransformerConfig,
) -> None:
  _, cache = _stepped(model)
  tokens, hidden = _pairs(model)
  lengths = jnp.array([_NUM_TOKENS, 4, 0], jnp.int32)
  rebuilt = jax.jit(drafter.rebuild_cache, static_argnums=0)(
    model, _params(model), tiny.params(model), tokens, hidden, lengths
  )
  np.testing.assert_array_equal(rebuilt.lengths_B, lengths)
  for name in ('keys', 'values'):
    (wanted,), (found,) = getattr(cache, name), getattr(rebuilt, name)
    assert found.shape == wanted.shape
    for row, length in enumerate(lengths):
      _assert_close(found[row, :, :length], wanted[row, :, :length])


@each_model
def test_a_position_does_not_depend_on_later_ones(
  model: transformer.TransformerConfig,
) -> None:
  tokens, hidden = _pairs(model)
  before, _ = _forward(model, tokens, hidden)
  t = 6
  after, _ = _forward(
    model,
    tokens.at[:, t:].set((tokens[:, t:] + 1) % model.vocab_size),
    hidden.at[:, t:].add(1.0),
  )
  np.testing.assert_array_equal(after[:, :t], before[:, :t])
  assert (np.abs(after[:, t:] - before[:, t:]).max(-1) > 1e-3).all()


@each_model
def test_packed_documents_do_not_see_each_other(
  model: transformer.TransformerConfig,
) -> None:
  tokens, hidden = _pairs(model)
  half = _NUM_TOKENS // 2
  index = jnp.broadcast_to(jnp.arange(_NUM_TOKENS), tokens.shape)
  packed, _ = _forward(
    model,
    tokens,
    hidden,
    positions_BT=index % half,
    segment_ids_BT=1 + index // half,
  )
  for part in (slice(0, half), slice(half, None)):
    alone, _ = _forward(model, tokens[:, part], hidden[:, part])
    _assert_close(packed[:, part], alone)


def test_a_branch_of_a_tree_gives_what_its_path_alone_gives() -> None:
  model, held = _ROTARY, 4
  tokens, hidden = _pairs(model)
  cache = drafter.empty_cache(model, 3, _NUM_TOKENS)
  _, cache = _forward(model, tokens[:, :held], hidden[:, :held], cache=cache)
  nodes = slice(held, held + 4)
  # 0 has the children 1 and 2; 3 is a child of 1.
  seen = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
  depths = jnp.array([0, 1, 1, 2])
  branched, _ = _forward(
    model,
    tokens[:, nodes],
    hidden[:, nodes],
    positions_BT=jnp.broadcast_to(held + depths, (3, 4)),
    cache=cache,
    tail_mask_BTT=jnp.broadcast_to(jnp.array(seen, bool), (3, 4, 4)),
  )
  for path in ([0, 1, 3], [0, 2]):
    chosen = held + np.array(path)
    alone, _ = _forward(
      model, tokens[:, chosen], hidden[:, chosen], cache=cache
    )
    _assert_close(branched[:, np.array(path)], alone)


def test_positions_that_are_not_real_leave_no_trace() -> None:
  model = _ROTARY
  tokens, hidden = _pairs(model)
  num_new = jnp.array([2, 0, 3], jnp.int32)
  cache = drafter.empty_cache(model, 3, _NUM_TOKENS)
  _, cache = _forward(
    model, tokens[:, :3], hidden[:, :3], cache=cache, num_new_B=num_new
  )
  np.testing.assert_array_equal(cache.lengths_B, num_new)
  after, _ = _forward(model, tokens[:, 5:6], hidden[:, 5:6], cache=cache)
  for row, count in enumerate(num_new):
    kept = np.array([*range(count), 5])
    alone, _ = _forward(
      model, tokens[row : row + 1, kept], hidden[row : row + 1, kept]
    )
    _assert_close(after[row, 0], alone[0, -1])


@each_model
def test_new_parameters_of_the_target_count_without_another_compilation(
  model: transformer.TransformerConfig,
) -> None:
  tokens, hidden = _pairs(model)

  traces = []

  @jax.jit
  def logits(params: Any, target_params: Any) -> jax.Array:
    traces.append(target_params)
    features, _ = drafter.forward(model, params, target_params, tokens, hidden)
    return transformer.unembed(model, target_params, features)

  target = tiny.params(model)
  before = logits(_params(model), target)
  head = {'embedding': target['embedding']}
  if not model.tie_embeddings:
    head = {'head': target['head']}
  other = {**target, **jax.tree.map(lambda x: 2 * x + 0.1, head)}
  after = logits(_params(model), other)
  assert len(traces) == 1
  assert (np.abs(after - before).max(-1) > 1e-3).all()


@pytest.mark.parametrize('stacked', [True, False])
def test_a_drafter_starts_from_the_last_layer(stacked: bool) -> None:
  model = _MODELS['untied']
  target = tiny.params(model)
  given = target if stacked else transformer.unstack_layers(target)
  params = drafter.init(model, jax.random.key(0), given)
  jax.tree.map(
    lambda found, layers: np.testing.assert_array_equal(found, layers[-1]),
    params['block'],
    target['layers'],
  )


@each_model
def test_every_parameter_has_named_axes(
  model: transformer.TransformerConfig,
) -> None:
  sizes = {**model.sizes, 'pair': 2}
  shapes = jax.tree.map(
    lambda leaf: tuple(sizes[name] for name in leaf.names),
    drafter.logical_axes(model),
  )
  found = jax.tree.map(lambda x: x.shape, _params(model))
  assert found == shapes
  total = sum(x.size for x in jax.tree.leaves(_params(model)))
  assert drafter.num_params(model) == total


def test_a_target_that_is_not_causal_is_refused() -> None:
  model = dataclasses.replace(_ROTARY, causal=False)
  with pytest.raises(ValueError, match='only a causal target'):
    drafter.init(model, jax.random.key(0))


def test_inputs_that_would_be_ignored_are_refused() -> None:
  tokens, hidden = _pairs(_ROTARY)
  with pytest.raises(ValueError, match='num_new_B needs a cache'):
    _forward(_ROTARY, tokens, hidden, num_new_B=jnp.ones(3, jnp.int32))
  cache = drafter.empty_cache(_ROTARY, 3, _NUM_TOKENS - 1)
  with pytest.raises(ValueError, match='cache of 9; make it larger'):
    _forward(_ROTARY, tokens, hidden, cache=cache)
