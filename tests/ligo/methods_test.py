"""Every method grows every architecture, and keeps the function it says."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.ligo import methods, operator
from efficient_llm.models import transformer
from efficient_llm.models.config import TransformerConfig
from tests.ligo import pairs
from tests.models import architectures

ALL = pytest.mark.parametrize('name', architectures.ALL)
METHODS = pytest.mark.parametrize('method', methods.METHODS)
# Float32 rounding through up to five layers, in logits of size about 3; sums
# over copies are of another order.
_ROUNDING = 1e-5

_SHAPES = {
  'depth': {'num_layers': 3},
  'double': {'width': pairs.DOUBLE},
  'half more': {'width': pairs.HALF_MORE},
  'both': {'width': pairs.DOUBLE, 'num_layers': 4},
}


def _largest(
  name: str, method: str, large: TransformerConfig
) -> tuple[str | None, float]:
  """Why the function changes, and by how much relative to its logits."""
  small = architectures.ALL[name]
  setting = methods.get(method)
  if setting.width in ('zero', 'average'):
    # The variance is smaller by this where new width is at rest.
    large = dataclasses.replace(
      large,
      norm_epsilon=small.norm_epsilon * small.embed_dim / large.embed_dim,
    )
  built = methods.build(setting, small, large, seed=1)
  params = architectures.params(name)
  grown = operator.grow(small, params, built)
  inputs = architectures.inputs(name, 2)
  ours = architectures.forward(large, grown, inputs).logits
  theirs = architectures.forward(small, params, inputs).logits
  difference = abs(np.asarray(ours) - np.asarray(theirs)).max()
  reason = methods.loss_of_function(setting, small, large)
  return reason, float(difference / abs(np.asarray(theirs)).max())


@ALL
@METHODS
def test_a_grown_model_has_the_large_one_s_shapes(
  name: str, method: str
) -> None:
  small = architectures.ALL[name]
  large = pairs.large(name, width=pairs.HALF_MORE, num_layers=3)
  built = methods.build(methods.get(method), small, large)
  grown = jax.eval_shape(
    lambda: operator.grow(small, architectures.params(name), built)
  )
  assert jax.tree.map(np.shape, grown) == jax.tree.map(
    np.shape, transformer.abstract_params(large)
  )


@METHODS
@ALL
def test_the_function_is_kept_where_the_method_says_so(
  name: str, method: str
) -> None:
  kept = 0
  for shape in _SHAPES.values():
    reason, difference = _largest(name, method, pairs.large(name, **shape))
    if reason is None:
      assert difference < _ROUNDING, shape
      kept += 1
    else:
      # No excuse is given without need.
      assert difference > 10 * _ROUNDING, (shape, reason)
  claims = methods.get(method)
  is_post = architectures.ALL[name].norm_placement == 'post'
  if claims.depth == 'identity' and not is_post:
    assert kept


@pytest.mark.parametrize(
  ('name', 'change', 'method'),
  [
    # A tied table without a norm of its own before it.
    ('bert', {'mlm_head': False}, 'clone'),
    # LEMON's own BERT, with the norm first.
    ('bert', {'norm_placement': 'pre', 'num_layers': 2}, 'lemon'),
  ],
)
def test_heads_that_cannot_keep_the_function_are_named(
  name: str, change: dict[str, Any], method: str
) -> None:
  small = dataclasses.replace(architectures.ARCHITECTURES[name], **change)
  large = dataclasses.replace(pairs.large(name, width=pairs.DOUBLE), **change)
  setting = methods.get(method)
  assert methods.loss_of_function(setting, small, large) is not None
  params = transformer.init(small, jax.random.key(0))
  grown = operator.grow(small, params, methods.build(setting, small, large))
  tokens_BT = architectures.tokens(2, 9)
  ours = architectures.forward(large, grown, tokens_BT).logits
  theirs = architectures.forward(small, params, tokens_BT).logits
  assert abs(np.asarray(ours) - np.asarray(theirs)).max() > 1e-3


def test_an_overlap_is_of_both_ends() -> None:
  small = dataclasses.replace(
    architectures.ARCHITECTURES['llama'], num_layers=8
  )
  large = dataclasses.replace(small, num_layers=12)
  (term,) = methods.build(methods.get('overlap'), small, large).terms
  # SOLAR's rule, with two layers left out at either end.
  assert np.argmax(term.depth['up'], 1).tolist() == [*range(6), *range(2, 8)]


def test_copies_do_not_stay_equal_where_noise_is_added() -> None:
  small = architectures.ARCHITECTURES['gpt2']
  large = pairs.large('gpt2', width=pairs.DOUBLE)
  params = architectures.params('gpt2')

  def rows(method: str) -> np.ndarray:
    built = methods.build(methods.get(method), small, large)
    kernel = operator.grow(small, params, built)['layers']['mlp']['up'][
      'kernel'
    ]
    return np.asarray(kernel)

  plain, noisy = rows('clone'), rows('noisy_clone')
  width = small.embed_dim
  np.testing.assert_array_equal(plain[:, :width], plain[:, width:])
  assert abs(noisy[:, :width] - noisy[:, width:]).min() > 0
  # What both copies give together is what one gave.
  np.testing.assert_allclose(
    noisy[:, :width] + noisy[:, width:], 2 * plain[:, :width], atol=1e-6
  )


@pytest.mark.parametrize(
  ('change', 'named'),
  [
    ({'num_layers': 1}, 'layers'),
    ({'embed_dim': 8, 'num_heads': 2}, 'embed'),
    ({'embed_dim': 32, 'num_heads': 4}, 'size of a head'),
    ({'vocab_size': 41}, 'vocab_size'),
    ({'norm': 'layer'}, 'norm'),
    ({'num_heads': 8, 'num_kv_heads': 8, 'embed_dim': 32}, 'serve'),
  ],
)
def test_pairs_that_do_not_go_together_are_refused(
  change: dict[str, object], named: str
) -> None:
  small = architectures.ARCHITECTURES['llama']
  large = dataclasses.replace(small, **change)
  with pytest.raises(ValueError, match=named):
    methods.build(methods.get('stack'), small, large)


@pytest.mark.parametrize(
  ('change', 'named'),
  [
    ({'vocab_size': 9}, 'vocab_size must be 7'),
    ({'patch_size': 3}, 'patch_size must be 2'),
    ({'image_size': 8}, 'image_size must be 6'),
    ({'image_channels': 1}, 'image_channels must be 3'),
    ({'class_layers': 3}, 'class_layers must be 2'),
    ({'talking_heads': False}, 'talking_heads must be True'),
    ({'layer_scale': None}, 'layer_scale must be 0.1'),
  ],
)
def test_models_of_other_images_are_refused_in_one_line(
  change: dict[str, Any], named: str
) -> None:
  small = architectures.ALL['cait']
  large = dataclasses.replace(pairs.large('cait', num_layers=3), **change)
  with pytest.raises(ValueError, match=named) as caught:
    methods.build(methods.get('stack'), small, large)
  assert '\n' not in str(caught.value)


def test_gains_may_begin_at_another_value_in_a_deeper_model() -> None:
  small = architectures.ALL['cait']
  large = dataclasses.replace(
    pairs.large('cait', num_layers=3), layer_scale=1e-5
  )
  methods.build(methods.get('stack'), small, large)


@ALL
@pytest.mark.parametrize('method', ['stack', 'lemon', 'direct_copy'])
def test_no_new_place_of_the_stream_stays_dead(name: str, method: str) -> None:
  """Where a factor and what it multiplies are both zero, no gradient comes."""
  small, large = architectures.ALL[name], pairs.large(name, width=pairs.DOUBLE)
  built = methods.build(methods.get(method), small, large, seed=1)
  grown = operator.grow(small, architectures.params(name), built)
  inputs = jnp.asarray(architectures.inputs(name, 2))

  def loss(params: Any) -> jax.Array:
    logits = transformer.apply(large, params, inputs).logits
    assert logits is not None
    return -jnp.log(jax.nn.softmax(logits)[..., 0]).mean()

  out = jax.jit(jax.grad(loss))(grown)['layers']['attention']['out']['kernel']
  assert (abs(np.asarray(out)[..., small.embed_dim :]).max((0, 1, 2)) > 0).all()


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
  with pytest.raises(ValueError, match='stack'):
    methods.get('grow')
