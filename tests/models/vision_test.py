"""DeiT and CaiT against plain numpy in float64, head by head."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import transformer
from tests.models import architectures

ALL = pytest.mark.parametrize('name', architectures.IMAGE_MODELS)
_IMAGES = architectures.images(2)


def _norm(params: Any, x: np.ndarray, epsilon: float) -> np.ndarray:
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
  return x * params['scale'] + params['bias']


def _softmax(logits: np.ndarray) -> np.ndarray:
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()


def _attend(
  params: Any, queries_TD: np.ndarray, source_SD: np.ndarray
) -> np.ndarray:
  def project(name: str, x: np.ndarray, head: int) -> np.ndarray:
    return x @ params[name]['kernel'][:, head] + params[name]['bias'][head]

  num_heads = params['query']['kernel'].shape[1]
  heads = range(num_heads)
  logits = [
    project('query', queries_TD, n)
    @ project('key', source_SD, n).T
    / math.sqrt(params['query']['kernel'].shape[2])
    for n in heads
  ]

  def mixed(name: str, maps: list[np.ndarray]) -> list[np.ndarray]:
    if name not in params:
      return maps
    kernel, bias = params[name]['kernel'], params[name]['bias']
    return [
      bias[m] + np.sum([kernel[n, m] * maps[n] for n in heads], axis=0)
      for m in heads
    ]

  weights = [
    np.stack([_softmax(row) for row in head])
    for head in mixed('mix_logits', logits)
  ]
  total = np.zeros(queries_TD.shape) + params['out']['bias']
  for n, weights_TS in enumerate(mixed('mix_weights', weights)):
    values = weights_TS @ project('value', source_SD, n)
    total += values @ params['out']['kernel'][n]
  return total


def _mlp(params: Any, x: np.ndarray) -> np.ndarray:
  x = x @ params['up']['kernel'] + params['up']['bias']
  x = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
  return x @ params['down']['kernel'] + params['down']['bias']


def _gained(params: Any, name: str, x: np.ndarray) -> np.ndarray:
  return x * params[name]['scale'] if name in params else x


def _logits(
  config: transformer.TransformerConfig, params: Any, image: np.ndarray
) -> np.ndarray:
  embedding, side = params['embedding'], config.patch_size
  epsilon = config.norm_epsilon
  assert side is not None
  patches = [
    image[y : y + side, x : x + side].astype(np.float64).reshape(-1) / 127.5 - 1
    for y in range(0, image.shape[0], side)
    for x in range(0, image.shape[1], side)
  ]
  x = np.stack(patches) @ embedding['patches']['kernel']
  x = x + embedding['patches']['bias']
  first = embedding['class_token'][None]
  if not config.class_layers:
    x = np.concatenate([first, x])
  x = x + embedding['positions']
  for index in range(config.num_layers):
    layer = jax.tree.map(lambda leaf, i=index: leaf[i], params['layers'])
    h = _norm(layer['attention_norm'], x, epsilon)
    x = x + _gained(layer, 'attention_gain', _attend(layer['attention'], h, h))
    h = _mlp(layer['mlp'], _norm(layer['mlp_norm'], x, epsilon))
    x = x + _gained(layer, 'mlp_gain', h)
  token = x[:1] if not config.class_layers else first
  for index in range(config.class_layers):
    layer = jax.tree.map(lambda leaf, i=index: leaf[i], params['class_layers'])
    both = _norm(layer['attention_norm'], np.concatenate([token, x]), epsilon)
    h = _attend(layer['attention'], both[:1], both)
    token = token + _gained(layer, 'attention_gain', h)
    h = _mlp(layer['mlp'], _norm(layer['mlp_norm'], token, epsilon))
    token = token + _gained(layer, 'mlp_gain', h)
  hidden = _norm(params['final_norm'], token, epsilon)
  return hidden @ params['head']['kernel'] + params['head']['bias']


@ALL
def test_logits_are_those_of_plain_numpy(name: str) -> None:
  config = architectures.IMAGE_MODELS[name]
  params = architectures.params(name)
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  found = architectures.forward(config, params, _IMAGES).logits
  expected = np.stack([_logits(config, exact, image) for image in _IMAGES])
  # Float32 rounding through four layers, in logits of size about 3.
  np.testing.assert_allclose(np.asarray(found), expected, atol=2e-5)


@ALL
@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_what_is_recomputed_changes_no_gradient(name: str, remat: Any) -> None:
  config, params = architectures.ALL[name], architectures.params(name)

  def gradient(config: transformer.TransformerConfig) -> Any:
    def total(params: Any) -> jax.Array:
      logits = transformer.apply(config, params, jnp.asarray(_IMAGES)).logits
      assert logits is not None
      return jnp.sum(logits[..., 0])

    return jax.jit(jax.grad(total))(params)

  found = gradient(dataclasses.replace(config, remat=remat))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
    found,
    gradient(config),
  )
  # Everything takes part, the gains and mixed heads too.
  assert all(abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


def test_bfloat16_is_near_float32() -> None:
  config, params = architectures.ALL['cait'], architectures.params('cait')
  half = dataclasses.replace(config, dtype='bfloat16')
  found = architectures.forward(half, params, _IMAGES)
  assert found.hidden.dtype == jnp.bfloat16
  exact = architectures.forward(config, params, _IMAGES)
  np.testing.assert_allclose(
    np.asarray(found.logits), np.asarray(exact.logits), atol=0.1
  )


def test_gains_and_heads_begin_as_in_the_paper() -> None:
  config = dataclasses.replace(architectures.ALL['cait'], init_std=0.02)
  params: Any = jax.jit(transformer.init, static_argnums=0)(
    config, jax.random.key(0)
  )
  for stack in ('layers', 'class_layers'):
    for gain in ('attention_gain', 'mlp_gain'):
      np.testing.assert_array_equal(
        params[stack][gain]['scale'], np.float32(0.1)
      )
  # No smaller start of what is added, as the gains are there for that.
  down = params['layers']['mlp']['down']['kernel']
  assert np.std(down) == pytest.approx(0.02, rel=0.1)
  assert 'mix_logits' not in params['class_layers']['attention']
  first, second = (np.asarray(down[i]) for i in range(2))
  assert (first != second).all()


@ALL
def test_images_of_another_size_are_refused_in_one_line(name: str) -> None:
  config, params = architectures.ALL[name], architectures.params(name)
  with pytest.raises(ValueError, match=r'takes images \(6, 6, 3\)') as caught:
    transformer.apply(
      config, params, jnp.asarray(architectures.images(1, size=8))
    )
  assert '\n' not in str(caught.value)
  with pytest.raises(ValueError, match='are for text'):
    transformer.apply(
      config,
      params,
      jnp.asarray(_IMAGES),
      segment_ids_BT=jnp.ones((2, 9), jnp.int32),
    )


def test_images_are_refused_by_a_model_of_text() -> None:
  config, params = architectures.ALL['gpt2'], architectures.params('gpt2')
  with pytest.raises(ValueError, match=r'set model\.patch_size'):
    transformer.apply(config, params, jnp.asarray(_IMAGES))
