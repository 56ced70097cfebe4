"""Islands on a model of a few numbers, whose inner steps are given."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import typing
from efficient_llm.diloco import exchange, fragments, mesh, outer
from efficient_llm.diloco.config import DilocoConfig
from efficient_llm.diloco.schedule import Schedule
from efficient_llm.diloco.state import DilocoState
from efficient_llm.models import transformer
from efficient_llm.training import loop
from efficient_llm.training import state as train_state

NUM_LAYERS = 3
AXES = {
  'embedding': {'w': typing.LogicalAxes(outputs=('embed',))},
  'layers': {'w': typing.LogicalAxes(outputs=('embed',), stack=('layers',))},
  'final_norm': {'w': typing.LogicalAxes(outputs=('embed',))},
}
_SHAPES = {'embedding': (4,), 'layers': (NUM_LAYERS, 2), 'final_norm': (3,)}

# (step, island) -> what the inner step adds to every leaf.
Moves = Callable[[int, int], dict[str, Any]]


def params(seed: int = 0) -> dict[str, Any]:
  rng = np.random.default_rng(seed)
  return {
    name: {'w': rng.normal(size=shape).astype(np.float32)}
    for name, shape in _SHAPES.items()
  }


def random_moves(step: int, island: int) -> dict[str, Any]:
  """Islands that go different ways."""
  return jax.tree.map(lambda x: x / 8, params(1000 + 10 * step + island))


def config(num_steps: int = 8, **changes: Any) -> DilocoConfig:
  settings = {'islands': 2, 'sync_period': 4, **changes}
  return DilocoConfig(
    model=transformer.TransformerConfig(num_layers=NUM_LAYERS),
    loop=loop.LoopConfig(num_steps=num_steps),
    optimizer=optimizer_lib.OptimizerConfig(warmup_steps=0),
    **settings,
  )


def start(
  config: DilocoConfig,
) -> tuple[DilocoState, mesh.OuterPrograms]:
  """State of step 0 and the programs between inner steps."""
  config.validate()
  setup = exchange.Setup(
    config,
    outer.make_optimizer(config.outer, num_islands=config.islands),
    fragments.Fragments(config.fragments, AXES, num_layers=NUM_LAYERS),
  )
  plain = optimizer_lib.Optimizer(optax.adam(0.1), lambda _: 0.1)
  inner = train_state.create(
    jax.tree.map(jnp.asarray, params()), plain, jax.random.key(0)
  )
  state = mesh.make_state(inner, setup, num_islands=config.islands)
  where = SingleDeviceSharding(jax.devices()[0])
  return state, mesh.OuterPrograms(setup, jax.tree.map(lambda _: where, state))


def walk(
  config: DilocoConfig,
  moves: Moves = random_moves,
  *,
  tokens: Callable[[int], float] = lambda island: 1.0,
) -> Iterator[tuple[DilocoState, list[Any]]]:
  """The state after each step, and the metrics of its rounds."""
  state, programs = start(config)
  schedule = Schedule(config)
  for step in range(1, config.loop.num_steps + 1):
    trains_M = schedule.trains(step)
    each = [moves(step, m) for m in range(config.islands)]
    added = _stacked(each, trains_M)
    counted = np.array([tokens(m) for m in range(config.islands)]) * trains_M
    islands = state.islands
    state = state.replace(
      step=state.step + 1,
      islands=islands.replace(
        params=jax.tree.map(jnp.add, islands.params, added)
      ),
      tokens_PM=state.tokens_PM + counted.astype(np.float32),
    )
    rounds = []
    for event in schedule.events(step):
      state, found = programs(state, event)
      if found is not None:
        rounds.append(jax.device_get(found))
    yield jax.tree.map(np.asarray, state), rounds


def last(config: DilocoConfig, *args: Any, **kwargs: Any) -> DilocoState:
  return list(walk(config, *args, **kwargs))[-1][0]


def flat(tree: Any) -> np.ndarray:
  """All numbers of a tree in a row."""
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def flat_islands(tree_M: Any) -> np.ndarray:
  """All numbers of stacked trees, a row for each island."""
  leaves = jax.tree.leaves(tree_M)
  return np.concatenate([x.reshape(len(x), -1) for x in leaves], 1)


def _stacked(trees: list[Any], trains_M: np.ndarray) -> Any:
  """Along an island axis; 0 for islands that do not train."""
  wanted = [
    tree if trains else jax.tree.map(np.zeros_like, tree)
    for tree, trains in zip(trees, trains_M, strict=True)
  ]
  return jax.tree.map(lambda *x: np.stack(x), *wanted)
