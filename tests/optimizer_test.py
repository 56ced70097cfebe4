import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_llm import optimizer
from efficient_llm.models import transformer
from efficient_llm.typing import LogicalAxes
from tests.models import architectures

_MATRIX = LogicalAxes(inputs=('embed',), outputs=('mlp',), stack=('layers',))
_AXES = {
  'layers': {
    'up': {
      'kernel': _MATRIX,
      'bias': LogicalAxes(outputs=('mlp',), stack=('layers',)),
    },
    'out': {
      'kernel': LogicalAxes(
        inputs=('heads', 'head_dim'), outputs=('embed',), stack=('layers',)
      )
    },
    'norm': {'scale': LogicalAxes(outputs=('embed',), stack=('layers',))},
  },
  'embedding': {'tokens': LogicalAxes(inputs=('vocab',), outputs=('embed',))},
  'head': {'kernel': LogicalAxes(inputs=('embed',), outputs=('vocab',))},
}
_SIZES = {
  'layers': 2,
  'embed': 12,
  'mlp': 20,
  'heads': 3,
  'head_dim': 8,
  'vocab': 30,
}


def _random(seed: int) -> Any:
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(
      rng.normal(size=[_SIZES[name] for name in leaf.names]), np.float32
    ),
    _AXES,
  )


def _first_update(config: optimizer.OptimizerConfig, grads: Any) -> Any:
  """The change of the parameters in a first step at the peak rate."""
  config = dataclasses.replace(config, warmup_steps=0, schedule='constant')
  transform = optimizer.make_optimizer(config, _AXES, num_steps=10).transform
  params = _random(1)
  state = transform.init(params)
  return jax.jit(transform.update)(grads, state, params)[0]


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_weight_decay_takes_matrices_only(name: Any) -> None:
  grads = _random(2)
  updates = [
    _first_update(
      optimizer.OptimizerConfig(
        name=name, learning_rate=0.5, weight_decay=decay, clip_norm=None
      ),
      grads,
    )
    for decay in (0.0, 0.25)
  ]
  change = jax.tree.map(lambda plain, decayed: decayed - plain, *updates)
  expected = jax.tree.map(
    lambda axes, param: -0.125 * param if axes.is_matrix else 0 * param,
    _AXES,
    _random(1),
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), change, expected
  )


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_an_update_scales_with_the_learning_rate(name: Any) -> None:
  small, large = (
    _first_update(
      optimizer.OptimizerConfig(name=name, learning_rate=rate), _random(2)
    )
    for rate in (0.125, 0.5)
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(4 * x, y, rtol=1e-6), small, large
  )


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_step_lowers_a_quadratic(name: Any) -> None:
  params = _random(1)
  config = optimizer.OptimizerConfig(name=name, learning_rate=0.01)
  new = optax.apply_updates(params, _first_update(config, params))
  for before, after in zip(
    jax.tree.leaves(params), jax.tree.leaves(new), strict=True
  ):
    assert jnp.square(after).sum() < jnp.square(before).sum()


def test_muon_takes_inner_matrices_only() -> None:
  taken = jax.tree.map(
    lambda dimensions: dimensions is not None,
    optimizer.muon_dimensions(_AXES),
    is_leaf=lambda x: x is None or isinstance(x, tuple),
  )
  assert taken == {
    'layers': {
      'up': {'kernel': True, 'bias': False},
      'out': {'kernel': True},
      'norm': {'scale': False},
    },
    'embedding': {'tokens': False},
    'head': {'kernel': False},
  }


def test_muon_leaves_every_table_norm_and_bias_of_a_model_alone() -> None:
  axes = transformer.logical_axes(architectures.ARCHITECTURES['bert'])
  dimensions = optimizer.muon_dimensions(axes)
  taken = {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(
      dimensions,
      is_leaf=lambda x: isinstance(x, tuple),
    )
  }
  assert taken == {
    *(f'layers/attention/{p}/kernel' for p in ('query', 'key', 'value', 'out')),
    'layers/mlp/up/kernel',
    'layers/mlp/down/kernel',
    'head/transform/kernel',
  }


@pytest.mark.parametrize(
  ('path', 'shape'), [('up', (2, 12, 20)), ('out', (2, 24, 12))]
)
def test_a_muon_update_is_nearly_orthogonal_in_every_layer(
  path: str, shape: tuple[int, ...]
) -> None:
  config = optimizer.OptimizerConfig(
    name='muon', learning_rate=1.0, weight_decay=0.0, clip_norm=None
  )
  update = _first_update(config, _random(2))['layers'][path]['kernel']
  for layer in np.asarray(update).reshape(shape):
    singular = np.linalg.svd(layer, compute_uv=False)
    singular /= config.muon_scale * max(layer.shape) ** 0.5
    # Five Newton-Schulz steps with Jordan's coefficients: 0.7 to 1.2.
    assert singular.min() > 0.65
    assert singular.max() < 1.25
    rms = np.sqrt(np.square(layer).mean())
    # The mean square of the singular values is not quite 1.
    assert rms == pytest.approx(config.muon_scale, rel=0.2)


def test_what_muon_leaves_gets_an_adam_update() -> None:
  config = optimizer.OptimizerConfig(
    name='muon', learning_rate=1.0, weight_decay=0.0, clip_norm=None
  )
  grads = _random(2)
  update = _first_update(config, grads)
  for parts in (('embedding', 'tokens'), ('head', 'kernel')):
    gradient, change = grads, update
    for part in parts:
      gradient, change = gradient[part], change[part]
    # A first step of Adam is the sign of the gradient (Nesterov: scaled).
    ratio = -np.asarray(change) / np.sign(gradient)
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-3)


def test_a_large_gradient_is_clipped() -> None:
  config = optimizer.OptimizerConfig(
    learning_rate=1.0,
    weight_decay=0.0,
    # So large that the update is the gradient itself, over epsilon.
    epsilon=1e6,
    clip_norm=0.5,
  )
  update = _first_update(config, _random(2))
  assert 1e6 * float(optimizer.global_norm(update)) == pytest.approx(
    0.5, rel=1e-4
  )


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_every_moment_is_mapped_to_its_parameter(name: Any) -> None:
  axes = transformer.logical_axes(architectures.ARCHITECTURES['bert'])
  params = transformer.abstract_params(architectures.ARCHITECTURES['bert'])
  transform = optimizer.make_optimizer(
    optimizer.OptimizerConfig(name=name), axes, num_steps=1000
  ).transform
  state = jax.eval_shape(transform.init, params)
  mapped = optimizer.like_params(state, params, otherwise=None)
  pairs = list(
    zip(
      jax.tree.leaves(state),
      jax.tree.leaves(mapped, is_leaf=lambda x: x is None),
      strict=True,
    )
  )
  moments = [(leaf, like) for leaf, like in pairs if like is not None]
  others = [leaf for leaf, like in pairs if like is None]
  assert all(leaf.shape == like.shape for leaf, like in moments)
  assert all(leaf.size <= 3 for leaf in others)
  num_params = len(jax.tree.leaves(params))
  muon = 7 if name == 'muon' else 0
  assert len(moments) == 2 * num_params - muon


def test_the_longest_path_decides_between_parameters_of_one_name() -> None:
  values = {'norm': {'scale': 'inner'}, 'head': {'norm': {'scale': 'outer'}}}
  zeros = jax.tree.map(lambda _: jnp.zeros(3), values)
  state = optax.adam(1e-3).init(zeros)
  mapped: Any = optimizer.like_params(state, values, otherwise='counter')
  assert mapped[0].mu == mapped[0].nu == values
  assert mapped[0].count == 'counter'


def test_the_global_norm_is_taken_in_float32() -> None:
  tree = {'a': jnp.full(10_000, 0.1, jnp.bfloat16), 'b': jnp.zeros(3)}
  norm = optimizer.global_norm(tree)
  assert norm.dtype == jnp.float32
  assert float(norm) == pytest.approx(100 * float(tree['a'][0]), rel=1e-5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'learning_rate': 0.0}, 'learning_rate=0.0 must be positive.'),
    ({'learning_rate': float('nan')}, 'learning_rate=nan must be positive.'),
    ({'epsilon': 0.0}, 'epsilon=0.0 must be positive.'),
    ({'muon_scale': -0.2}, 'muon_scale=-0.2 must be positive.'),
    ({'warmup_steps': -1}, 'warmup_steps=-1 must be 0 or more.'),
    ({'weight_decay': -0.1}, 'weight_decay=-0.1 must be 0 or more.'),
    ({'b1': 1.0}, 'b1=1.0 must be in [0, 1).'),
    ({'b2': -0.1}, 'b2=-0.1 must be in [0, 1).'),
    ({'muon_momentum': 1.5}, 'muon_momentum=1.5 must be in [0, 1).'),
    ({'decay_fraction': 1.5}, 'decay_fraction=1.5 must be in [0, 1].'),
    ({'final_fraction': -1.0}, 'final_fraction=-1.0 must be in [0, 1].'),
    ({'clip_norm': 0.0}, 'clip_norm=0.0 must be positive; None is off.'),
    (
      {'clip_norm': float('nan')},
      'clip_norm=nan must be positive; None is off.',
    ),
    ({'name': 'lion'}, "name='lion' must be one of adamw, muon, sgd."),
    (
      {'schedule': 'step'},
      "schedule='step' must be one of cosine, wsd, constant.",
    ),
  ],
)
def test_a_setting_out_of_range_is_refused(
  changes: dict[str, Any], message: str
) -> None:
  with pytest.raises(ValueError) as caught:
    optimizer.OptimizerConfig(**changes).validate()
  assert str(caught.value) == f'optimizer.{message}'


def test_sgd_subtracts_the_gradient_and_decays_matrices_only() -> None:
  config = optimizer.OptimizerConfig(
    name='sgd', learning_rate=0.5, weight_decay=0.1, clip_norm=None
  )
  grads, params = _random(2), _random(1)
  update = _first_update(config, grads)
  jax.tree.map(
    lambda axes, u, g, p: np.testing.assert_allclose(
      u, -0.5 * (g + 0.1 * p * axes.is_matrix), rtol=1e-5, atol=1e-6
    ),
    _AXES,
    update,
    grads,
    params,
  )
