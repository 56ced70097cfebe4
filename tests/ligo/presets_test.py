"""The papers' pairs at full size, without making them; and a mesh of eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.ligo import layerwise, methods, operator
from efficient_llm.models import presets, transformer
from tests import simulated_devices

# Wang et al. 2023, table 4; the size of a head is 64 where nothing is said.
_PAIRS = [
  ('bert_small', 'bert_base'),
  ('bert_base', 'bert_large'),
  ('bert_small', 'bert_large'),
  ('roberta_small', 'roberta_base'),
  ('gpt2', 'gpt2_medium'),
  ('deit_small', 'deit_base'),
  # Of heads of 48, and in width alone.
  ('cait_xs24', 'cait_s24'),
]


@pytest.mark.parametrize(('small', 'large'), _PAIRS)
@pytest.mark.parametrize('method', ['ligo_released', 'aki'])
def test_the_papers_pairs_grow_into_the_large_shapes(
  small: str, large: str, method: str
) -> None:
  small_model, large_model = presets.get(small), presets.get(large)
  built = methods.build(methods.get(method), small_model, large_model)
  grown = jax.eval_shape(
    functools.partial(operator.grow, small_model),
    transformer.abstract_params(small_model),
    built,
  )
  assert jax.tree.map(np.shape, grown) == jax.tree.map(
    np.shape, transformer.abstract_params(large_model)
  )
  inputs = jnp.zeros((1, 8), jnp.int32)
  if large_model.reads_images:
    inputs = jnp.zeros((1, 224, 224, 3), jnp.uint8)
  logits = jax.eval_shape(
    lambda params, operator: (
      transformer.apply(
        large_model,
        layerwise.grow(
          small_model, params, operator, num_layers=large_model.num_layers
        ),
        inputs,
      ).logits
    ),
    transformer.abstract_params(small_model),
    built,
  )
  num_places = 1 if large_model.reads_images else 8
  assert logits.shape == (1, num_places, large_model.vocab_size)


@pytest.mark.slow
def test_growth_on_eight_devices_is_that_on_one() -> None:
  found = simulated_devices.run('tests.ligo.eight_devices')
  assert found['parts'] == 8
  assert found['moved'] > 1e-3
  # Float32 rounding of sums in another order, through two updates.
  assert found['operator'] < 1e-4
  assert found['grown'] < 1e-4
