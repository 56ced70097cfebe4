"""Compares one device with meshes of eight; prints the differences as JSON.

A program of its own, as the number of simulated devices is fixed before jax
starts.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention

from efficient_llm import optimizer, sharding
from efficient_llm.models import transformer
from efficient_llm.training import objectives, state, step

_MODEL = transformer.TransformerConfig(
  vocab_size=64,
  num_layers=2,
  embed_dim=32,
  num_heads=4,
  num_kv_heads=2,
  # What the splash kernel needs.
  head_dim=128,
  mlp_dim=64,
  max_positions=128,
  tie_embeddings=False,
)
_MESHES = {
  'one': sharding.MeshConfig(fsdp=1),
  'fsdp4_tensor2': sharding.MeshConfig(fsdp=4, tensor=2),
  'data2_fsdp4': sharding.MeshConfig(data=2, fsdp=4),
}


def _batch() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, 64, (8, 17), np.int32)
  return {
    'tokens': tokens_BT[:, :-1],
    'targets': tokens_BT[:, 1:],
    'segment_ids': np.repeat([[1, 2]], 8, 0).repeat(8, 1).astype(np.int32),
    'positions': np.tile(np.arange(8, dtype=np.int32), (8, 2)),
    'loss_weights': rng.integers(0, 2, (8, 16)).astype(np.float32),
  }


def _train(config: sharding.MeshConfig, params: Any) -> dict[str, Any]:
  """Logits, and parameters and metrics after two steps."""
  num_devices = 1 if config == _MESHES['one'] else 8
  mesh = sharding.make_mesh(config, devices=jax.devices()[:num_devices])
  axes = transformer.logical_axes(_MODEL)
  # A large epsilon: else Adam turns rounding of tiny gradients into signs.
  settings = optimizer.OptimizerConfig(
    learning_rate=1.0, warmup_steps=0, epsilon=0.1
  )
  optim = optimizer.make_optimizer(settings, axes, num_steps=10)

  def make(params: Any) -> state.TrainState:
    return state.create(params, optim, jax.random.key(0))

  shardings = state.shardings(jax.eval_shape(make, params), axes, mesh)
  rows = sharding.batch_sharding(mesh)
  batch = sharding.to_global(_batch(), rows)
  train = step.make_train_step(objectives.language_model_loss(_MODEL), optim)
  with jax.set_mesh(mesh):
    train_state = jax.jit(make, out_shardings=shardings)(params)
    apply = jax.jit(functools.partial(transformer.apply, _MODEL))
    output = apply(
      train_state.params,
      batch['tokens'],
      segment_ids_BT=batch['segment_ids'],
      positions_BT=batch['positions'],
    )
    odd = apply(train_state.params, jnp.asarray(_batch()['tokens'][:3]))
    run = step.jit_train_step(train, shardings, rows)
    train_state, _ = run(train_state, batch)
    train_state, metrics = run(train_state, batch)
  kernel = train_state.params['layers']['mlp']['up']['kernel']
  moments = [
    leaf
    for leaf in jax.tree.leaves(train_state.opt_state)
    if leaf.shape == kernel.shape
  ]
  return {
    'logits': output.logits,
    'odd_logits': odd.logits,
    'params': jax.device_get(train_state.params),
    'loss': metrics['loss'],
    'grad_norm': metrics['grad_norm'],
    'parts': [
      kernel.size // leaf.addressable_shards[0].data.size
      for leaf in [kernel, *moments]
    ],
    'batch_parts': 8 // batch['tokens'].addressable_shards[0].data.shape[0],
  }


def _difference(one: Any, other: Any) -> float:
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return max(
    float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs
  )


def _splash_difference(params: Any) -> float:
  """The TPU kernel, interpreted, on each device's part of rows and heads."""
  make = splash_attention.make_splash_mha_single_device
  splash_attention.make_splash_mha_single_device = functools.partial(
    make, interpret=True
  )
  rng = np.random.default_rng(0)
  tokens_BT = jnp.asarray(rng.integers(0, 64, (4, 128), np.int32))
  segment_ids_BT = jnp.arange(128) // 50 + jnp.ones((4, 1), jnp.int32)
  mesh = sharding.make_mesh(_MESHES['fsdp4_tensor2'])
  logits = []
  for implementation in ('xla', 'splash'):
    config = dataclasses.replace(
      _MODEL, attention_implementation=implementation
    )
    with jax.set_mesh(mesh):
      apply = jax.jit(functools.partial(transformer.apply, config))
      output = apply(params, tokens_BT, segment_ids_BT=segment_ids_BT)
    logits.append(output.logits)
  return _difference(*logits)


def main() -> None:
  """Prints one JSON object."""
  init = jax.jit(transformer.init, static_argnums=0)
  params = jax.device_get(init(_MODEL, jax.random.key(0)))
  runs = {name: _train(config, params) for name, config in _MESHES.items()}
  one = runs.pop('one')
  report: dict[str, Any] = {'num_devices': jax.device_count()}
  for name, run in runs.items():
    report[name] = {
      'parts': run['parts'],
      'batch_parts': run['batch_parts'],
      **{
        key: _difference(one[key], run[key])
        for key in ('logits', 'odd_logits', 'params', 'loss', 'grad_norm')
      },
    }
  report['size_of_logits'] = float(np.abs(one['logits']).max())
  report['splash'] = _splash_difference(params)
  print(json.dumps(report))


if __name__ == '__main__':
  main()
