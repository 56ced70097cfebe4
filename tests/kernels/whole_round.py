"""Rounds of speculation with the kernels in them, compiled ahead of time."""

import functools
from typing import Any

import jax
import numpy as np

from efficient_llm.models import attention, presets, sampling, transformer
from efficient_llm.speculative import drafter as drafter_lib
from efficient_llm.speculative import model_draft, prefill, rounds
from efficient_llm.speculative import state as state_lib
from efficient_llm.speculative import tree as tree_lib

NUM_LAYERS = 2


def compiled(
  device: Any, platform: str, implementation: attention.Implementation
) -> str:
  """The program of `rounds.run` with trees, a learned drafter and bfloat16.

  Args:
    device: Of a topology.
    platform: To lower for.
    implementation: Of attention behind the caches.
  """
  config = presets.get(
    'test',
    num_layers=NUM_LAYERS,
    embed_dim=256,
    num_heads=2,
    head_dim=128,
    max_positions=256,
    dtype='bfloat16',
    attention_implementation=implementation,
  )
  plan = state_lib.Plan(
    config, sampling.SamplingConfig(16), model_draft.drafter(config), 128
  )

  def inputs(key: jax.Array) -> tuple[Any, Any, state_lib.State]:
    params = transformer.unstack_layers(transformer.init(config, key))
    draft_params = drafter_lib.init(config, key)
    prompts = jax.numpy.ones((4, 32), jax.numpy.int32)
    state = prefill.start(
      plan,
      False,
      params,
      draft_params,
      prompts,
      prompts.sum(1),
      sampling.row_keys(key, 4),
      None,
    )
    return params, draft_params, state

  mesh = jax.sharding.Mesh(
    np.array([device]), ('one',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  params, draft_params, state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    jax.eval_shape(inputs, jax.random.key(0)),
  )
  number = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
  run = functools.partial(rounds.run, plan, tree_lib.DraftShape(2, 2, 5))
  with jax.set_mesh(mesh):
    traced = jax.jit(run).trace(params, draft_params, state, number, number)
    lowered = traced.lower(lowering_platforms=(platform,))
  return lowered.compile().as_text() or ''
