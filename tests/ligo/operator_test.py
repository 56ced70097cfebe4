"""The engine against dense products, and what it must leave alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.ligo import layerwise, methods, operator
from efficient_llm.models import transformer
from tests.ligo import pairs
from tests.models import architectures

ALL = pytest.mark.parametrize('name', architectures.ALL)
# Float32 sums of a few dozen products of numbers of size 1.
_ROUNDING = 1e-5


def _random_like(tree: Any, seed: int = 0) -> Any:
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree
  )


def _random_operator(name: str, num_terms: int = 1) -> operator.Operator:
  """Of the shapes of a method, with other numbers."""
  small = architectures.ALL[name]
  method = methods.get('stack')
  built = methods.build(
    method, small, pairs.large(name, width=pairs.HALF_MORE, num_layers=3)
  )
  terms = tuple(_random_like(built.terms[0], seed) for seed in range(num_terms))
  return operator.Operator(terms)


@ALL
def test_the_identity_returns_the_small_model(name: str) -> None:
  params = architectures.params(name)
  config = architectures.ALL[name]
  grown = operator.grow(config, params, operator.identity())
  jax.tree.map(np.testing.assert_array_equal, grown, params)


@ALL
@pytest.mark.parametrize('num_terms', [1, 2])
def test_leaves_are_what_dense_kronecker_products_give(
  name: str, num_terms: int
) -> None:
  config = architectures.ALL[name]
  params = architectures.params(name)
  built = _random_operator(name, num_terms)
  grown = operator.grow(config, params, built)
  axes = operator.leaf_maps(config)
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    keys = [key.key for key in path]
    names = axes['/'.join(keys)]
    found = grown
    for key in keys:
      found = found[key]
    grows = [n for n in names if n in built.terms[0].width]
    writes = [n for n in grows if not str(n).endswith('.read')]
    expected = np.zeros(1)
    for term in built.terms if writes else built.terms[:1]:
      dense = np.eye(1)
      for i, (size, axis) in enumerate(zip(leaf.shape, names, strict=True)):
        matrix = np.eye(size)
        if axis is not None and axis in term.width:
          matrix = np.asarray(term.width[axis])
        if i == 0 and keys[0] == 'layers':
          matrix = np.asarray(term.depth[keys[-2]])
        dense = np.kron(dense, matrix)
      expected = expected + dense @ np.asarray(leaf).reshape(-1)
    scale = abs(expected).max()
    np.testing.assert_allclose(
      np.asarray(found).reshape(-1) / scale, expected / scale, atol=_ROUNDING
    )


@ALL
def test_every_layer_may_have_matrices_of_its_own(name: str) -> None:
  config, params = architectures.ALL[name], architectures.params(name)
  shared = _random_operator(name)
  (term,) = shared.terms
  width = dict(term.width)
  for key in ('mlp.out', 'mlp.read', 'query.out'):
    width[key] = jnp.broadcast_to(width[key], (3, *width[key].shape))
  own = operator.Operator((dataclasses.replace(term, width=width),))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
    operator.grow(config, params, own),
    operator.grow(config, params, shared),
  )


def test_heads_may_be_mapped_with_their_insides() -> None:
  config, params = (
    architectures.ARCHITECTURES['gpt2'],
    architectures.params('gpt2'),
  )
  shared = _random_operator('gpt2')
  (term,) = shared.terms
  head_dim = config.sizes['head_dim']
  width = {
    key: jnp.kron(x, jnp.eye(head_dim))
    if 'embed' not in key and 'mlp' not in key
    else x
    for key, x in term.width.items()
  }
  dense = operator.Operator((dataclasses.replace(term, width=width),))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
    operator.grow(config, params, dense),
    operator.grow(config, params, shared),
  )


@ALL
@pytest.mark.parametrize(
  ('method', 'num_layers'), [('ligo_released', 3), ('aki', 2), ('lemon', 3)]
)
def test_layers_made_in_the_scan_are_those_made_at_once(
  name: str, method: str, num_layers: int
) -> None:
  small, params = architectures.ALL[name], architectures.params(name)
  large = pairs.large(name, width=pairs.HALF_MORE, num_layers=num_layers)
  built = methods.build(methods.get(method), small, large)
  inputs = architectures.inputs(name, 2)
  whole = operator.grow(small, params, built)
  in_scan = layerwise.grow(small, params, built, num_layers=num_layers)
  found = transformer.apply(large, in_scan, jnp.asarray(inputs)).logits
  np.testing.assert_allclose(
    np.asarray(found),
    np.asarray(architectures.forward(large, whole, inputs).logits),
    # Float32 rounding in logits of size about 10.
    atol=1e-4,
  )


def test_variances_grow_by_the_squares() -> None:
  config = architectures.ARCHITECTURES['llama']
  built = _random_operator('llama')
  rng = np.random.default_rng(0)
  abstract = transformer.abstract_params(config)
  variance = jax.tree.map(
    lambda x: jnp.asarray(rng.uniform(0.5, 2, x.shape), jnp.float32), abstract
  )
  draws = [
    operator.grow(
      config,
      jax.tree.map(
        lambda v: (
          jnp.asarray(rng.normal(size=v.shape), jnp.float32) * jnp.sqrt(v)
        ),
        variance,
      ),
      built,
    )['layers']['mlp']['up']['kernel']
    for _ in range(400)
  ]
  predicted = operator.grow(config, variance, operator.square(built))
  ratio = np.var(draws, 0) / predicted['layers']['mlp']['up']['kernel']
  # The mean of many sample variances of 400 draws.
  assert abs(ratio.mean() - 1) < 0.02
