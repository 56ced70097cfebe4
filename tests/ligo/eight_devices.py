"""Growth on a mesh of eight devices against one; prints differences as JSON.

A program of its own, as the number of simulated devices is fixed before jax
starts.
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from efficient_llm import optimizer, sharding
from efficient_llm.ligo import learning, methods, operator
from efficient_llm.ligo.config import LearnConfig
from efficient_llm.models import transformer
from efficient_llm.training import state as state_lib

_SMALL = transformer.TransformerConfig(
  vocab_size=64,
  num_layers=2,
  embed_dim=32,
  num_heads=4,
  num_kv_heads=2,
  mlp_dim=64,
  max_positions=16,
)
_LARGE = dataclasses.replace(
  _SMALL, num_layers=3, embed_dim=64, num_heads=8, num_kv_heads=4, mlp_dim=128
)


def _batch() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, 64, (8, 17), np.int32)
  return {
    'tokens': tokens_BT[:, :-1],
    'targets': tokens_BT[:, 1:],
    'loss_weights': np.ones((8, 16), np.float32),
  }


def _found(mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """The operator after two steps, and what it makes of the small model."""
  config = LearnConfig(
    num_steps=2,
    optimizer=optimizer.OptimizerConfig(
      # A large epsilon: else Adam turns rounding of tiny gradients into signs.
      learning_rate=0.1,
      epsilon=0.1,
      warmup_steps=0,
      schedule='constant',
    ),
  )
  begin = methods.build(methods.get('ligo_released'), _SMALL, _LARGE)
  program = learning.build(config, _SMALL, _LARGE, begin, mesh)
  placed = sharding.param_shardings(
    mesh,
    transformer.logical_axes(_SMALL),
    transformer.abstract_params(_SMALL),
  )
  wanted = sharding.param_shardings(
    mesh,
    transformer.logical_axes(_LARGE),
    transformer.abstract_params(_LARGE),
  )
  small = jax.device_put(
    jax.jit(transformer.init, static_argnums=0)(_SMALL, jax.random.key(0)),
    placed,
  )
  batch = sharding.to_global(_batch(), sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    state: state_lib.TrainState = program.first_state()
    for _ in range(2):
      state, _ = program.learn_step(state, batch, small)
    grown = jax.jit(
      lambda params, small: operator.grow(
        _SMALL, small, program.operator(params)
      ),
      out_shardings=wanted,
    )(state.params, small)
  kernel = grown['layers']['mlp']['up']['kernel']
  return {
    'operator': jax.device_get(state.params),
    'grown': jax.device_get(grown),
    'parts': kernel.size // kernel.addressable_shards[0].data.size,
  }


def main() -> None:
  """Compares the meshes."""
  one = _found(
    sharding.make_mesh(sharding.MeshConfig(fsdp=1), devices=jax.devices()[:1])
  )
  eight = _found(sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2)))

  def largest(name: str) -> float:
    differences = jax.tree.map(
      lambda x, y: float(abs(x - y).max()), one[name], eight[name]
    )
    return max(jax.tree.leaves(differences))

  moved = methods.build(methods.get('ligo_released'), _SMALL, _LARGE)
  before = learning.parameters(
    moved, _SMALL, tie='free', num_layers=_LARGE.num_layers
  )
  print(
    json.dumps(
      {
        'operator': largest('operator'),
        'grown': largest('grown'),
        'parts': eight['parts'],
        'moved': float(
          abs(
            one['operator']['width']['mlp.out'] - before['width']['mlp.out']
          ).max()
        ),
      }
    )
  )


if __name__ == '__main__':
  main()
