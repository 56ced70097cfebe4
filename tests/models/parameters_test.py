import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm.models import transformer
from efficient_llm.typing import LogicalAxes
from tests.models import architectures

ALL = pytest.mark.parametrize('name', architectures.ARCHITECTURES)
_SMALL = dataclasses.replace(
  architectures.ARCHITECTURES['llama'], vocab_size=512, embed_dim=128
)
_INIT = jax.jit(transformer.init, static_argnums=0)


def test_the_same_key_makes_the_same_parameters() -> None:
  first, again = (_INIT(_SMALL, jax.random.key(3)) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, again)


def test_another_key_makes_other_parameters() -> None:
  first, other = (_INIT(_SMALL, jax.random.key(seed)) for seed in (3, 4))
  assert (first['embedding']['tokens'] != other['embedding']['tokens']).all()


@functools.cache
def _kernels(config: transformer.TransformerConfig) -> dict[str, np.ndarray]:
  """Every random matrix by name, layers apart."""
  params = _INIT(config, jax.random.key(0))
  single = transformer.unstack_layers(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(single)
    if np.std(leaf) > 0
  }


def test_no_two_matrices_start_alike() -> None:
  kernels = list(_kernels(_SMALL).values())
  assert len(kernels) == 1 + 2 * 7 + 1
  firsts = {float(kernel.ravel()[0]) for kernel in kernels}
  assert len(firsts) == len(kernels)


@pytest.mark.parametrize('init_std', [None, 0.3])
def test_matrices_start_with_the_documented_deviation(
  init_std: float | None,
) -> None:
  config = dataclasses.replace(_SMALL, init_std=init_std)
  residual = (2 * config.num_layers) ** -0.5
  expected = {
    'embedding/tokens': init_std or 0.02,
    'attention/query/kernel': init_std or 128**-0.5,
    'attention/key/kernel': init_std or 128**-0.5,
    'attention/value/kernel': init_std or 128**-0.5,
    'attention/out/kernel': residual * (init_std or 128**-0.5),
    'mlp/up/kernel': init_std or 128**-0.5,
    'mlp/gate/kernel': init_std or 128**-0.5,
    'mlp/down/kernel': residual * (init_std or 24**-0.5),
    'head/kernel': init_std or 128**-0.5,
  }
  # Cutting a normal distribution at three deviations leaves 0.98658 of one.
  for name, kernel in _kernels(config).items():
    std = next(std for end, std in expected.items() if name.endswith(end))
    tolerance = 4 / math.sqrt(2 * kernel.size)
    assert kernel.std() == pytest.approx(0.98658 * std, rel=tolerance), name
    assert abs(kernel).max() <= 3.0001 * std


def test_post_norm_models_have_no_smaller_residual_start() -> None:
  assert architectures.ARCHITECTURES['bert'].residual_scale == 1.0


@ALL
def test_every_parameter_has_an_axis_name_for_each_dimension(name: str) -> None:
  config = architectures.ARCHITECTURES[name]
  shapes = jax.tree.map(
    lambda leaf: tuple(config.sizes[axis] for axis in leaf.names),
    transformer.logical_axes(config),
  )
  params = transformer.abstract_params(config)
  assert shapes == jax.tree.map(lambda leaf: leaf.shape, params)


def test_layers_are_stacked_in_front() -> None:
  axes = transformer.logical_axes(architectures.ARCHITECTURES['llama'])
  assert axes['layers']['attention']['out']['kernel'] == LogicalAxes(
    inputs=('heads', 'head_dim'), outputs=('embed',), stack=('layers',)
  )


@ALL
def test_the_count_is_the_size_of_the_tree(name: str) -> None:
  config = architectures.ARCHITECTURES[name]
  params = architectures.params(name)
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert transformer.num_params(config) == total
  tables = sum(
    params['embedding'][table].size
    for table in ('tokens', 'positions', 'token_types')
    if table in params['embedding']
  )
  assert transformer.num_params(config, embeddings=False) == total - tables


def _compiled_flops(
  config: transformer.TransformerConfig, num_tokens: int
) -> float:
  """FLOPs of forward and backward pass per token, as XLA counts them."""

  def loss(params: Any, tokens_BT: jax.Array) -> jax.Array:
    output = transformer.apply(config, params, tokens_BT)
    assert output.logits is not None
    return jax.nn.log_softmax(output.logits)[..., 0].mean()

  step = jax.jit(jax.grad(loss)).lower(
    transformer.abstract_params(config),
    jax.ShapeDtypeStruct((1, num_tokens), np.int32),
  )
  analysis = step.compile().cost_analysis()
  assert isinstance(analysis, dict)
  return analysis['flops'] / num_tokens


@pytest.mark.parametrize('name', ['llama', 'bert'])
def test_flops_agree_with_the_compiler(name: str) -> None:
  config = dataclasses.replace(
    architectures.ARCHITECTURES[name],
    vocab_size=512,
    embed_dim=128,
    mlp_dim=512,
    max_positions=64,
    # A loop's body would be counted once.
    scan_unroll=2,
  )
  counted = transformer.flops_per_token(config, num_tokens=64)
  if config.causal:
    # XLA also computes the half that the mask throws away.
    counted += 12 * config.num_layers * 128 * 32
  # Norms, softmax and activations come on top: a few per cent at this width.
  assert 1.0 < _compiled_flops(config, 64) / counted < 1.1


def test_attention_costs_half_where_causal() -> None:
  causal = architectures.ARCHITECTURES['gpt2']
  both = dataclasses.replace(causal, causal=False)

  def attention(config: transformer.TransformerConfig) -> float:
    count = transformer.flops_per_token
    return count(config, num_tokens=32) - count(config, num_tokens=0)

  assert attention(both) == 2 * attention(causal) > 0
