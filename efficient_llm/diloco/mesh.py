"""READ FIRST. Islands as a mesh axis: H inner steps, then an outer one.

Every island trains by itself for `sync_period` steps: the inner program is the
train step of plain training, mapped over the island axis, and nothing in it
crosses islands. Then each sends by how much its parameters changed, the updates
are merged, and an outer optimiser steps the shared parameters (`exchange`,
`outer`). These are programs of their own, so that an inner step never waits for
another island.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efficient_llm import sharding, typing
from efficient_llm.diloco import compression, exchange, inner, methods, outer
from efficient_llm.diloco import fragments as fragments_lib
from efficient_llm.diloco import state as state_lib
from efficient_llm.diloco.config import DilocoConfig
from efficient_llm.diloco.schedule import Event, Schedule
from efficient_llm.diloco.state import DilocoState
from efficient_llm.models import attention
from efficient_llm.training import batch_layout, pretrain, step
from efficient_llm.training import state as train_state

# Islands whose outer optimiser steps parameters of their own.
_OWN_OUTER = ('eager', 'noloco')


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled-on-first-use functions of a run and what they work on.

  Attributes:
    mesh: The device mesh; calls happen inside `jax.set_mesh(mesh)`.
    inner_step: (step, islands, tokens_PM, batch) -> (step, islands, tokens_PM,
      metrics by island), donating all but the batch.
    outer_step: (state, event) -> (state, metrics or None), donating the state.
    eval_step: (params, batch) -> Loss.
    init_state: Makes the state of step 0, already sharded.
    started: (state, params) -> state of step 0 that starts from these, donating
      the state.
    abstract_state: Shapes, dtypes and shardings of the state, for a number of
      islands.
    resized: Makes a state that of this run's number of islands.
    abstract_batch: The same for a batch [M, B, T].
    batch_sharding: Where a batch lies.
    eval_sharding: Where a batch of validation lies.
    sent_bytes: What an island sends of each fragment.
  """

  mesh: Mesh
  inner_step: Callable[..., Any]
  outer_step: Callable[..., tuple[DilocoState, typing.Metrics | None]]
  eval_step: step.EvalStep
  init_state: Callable[[], DilocoState]
  started: Callable[[DilocoState, typing.Params], DilocoState]
  abstract_state: Callable[[int], DilocoState]
  resized: Callable[[DilocoState], DilocoState]
  abstract_batch: Mapping[str, jax.ShapeDtypeStruct]
  batch_sharding: NamedSharding
  eval_sharding: NamedSharding
  sent_bytes: tuple[int, ...]


def build(config: DilocoConfig, mesh: Mesh) -> Program:
  """Puts model, optimisers, islands and shardings together; compiles nothing.

  Args:
    config: The run.
    mesh: Its devices, which may be compile-only ones.
  Raises:
    ValueError: If islands, model or batch do not fit the mesh.
  """
  _check_islands(config, mesh)
  parts = pretrain.make_parts(_mapped(config, mesh), mesh)
  setup = exchange.Setup(
    config,
    outer.make_optimizer(config.outer, num_islands=config.islands),
    fragments_lib.Fragments(
      config.fragments, parts.axes, num_layers=config.model.num_layers
    ),
  )

  def make(num_islands: int, key: jax.Array) -> DilocoState:
    start = parts.init_state(key)
    return make_state(start, setup, num_islands=num_islands)

  def abstract_state(num_islands: int) -> DilocoState:
    shapes = jax.eval_shape(
      functools.partial(make, num_islands), jax.random.key(0)
    )
    shardings = state_lib.shardings(
      shapes,
      parts.axes,
      mesh,
      fragments=setup.fragments,
      has_own_outer=config.method in _OWN_OUTER,
    )
    return train_state.abstract(shapes, shardings)

  abstract = abstract_state(config.islands)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  eval_sharding = sharding.batch_sharding(mesh)
  spec = PartitionSpec('island', *eval_sharding.spec)
  batch_sharding = NamedSharding(mesh, spec)
  batch_layout.check_batch_size(
    config.data.batch_size,
    eval_sharding,
    num_microbatches=config.loop.num_microbatches,
  )
  rows = batch_layout.abstract_batch(config.data, batch_sharding)
  make_inner = functools.partial(
    inner.make,
    num_islands=config.islands,
    shardings=shardings,
    batch_sharding=batch_sharding,
    may_rest=Schedule(config).may_rest,
  )
  init = jax.jit(
    functools.partial(make, config.islands), out_shardings=shardings
  )
  return Program(
    mesh=mesh,
    inner_step=make_inner(parts.train_step),
    outer_step=OuterPrograms(setup, shardings),
    eval_step=step.jit_eval_step(
      parts.eval_loss, shardings.params, eval_sharding
    ),
    init_state=lambda: init(jax.random.key(config.seed)),
    started=jax.jit(
      state_lib.started, donate_argnums=0, out_shardings=shardings
    ),
    abstract_state=abstract_state,
    resized=functools.partial(_resized, config=config, shardings=shardings),
    abstract_batch={
      name: jax.ShapeDtypeStruct(
        (config.islands, *leaf.shape), leaf.dtype, sharding=batch_sharding
      )
      for name, leaf in rows.items()
    },
    batch_sharding=batch_sharding,
    eval_sharding=eval_sharding,
    sent_bytes=_sent_bytes(setup, abstract.params),
  )


def _mapped(config: DilocoConfig, mesh: Mesh) -> DilocoConfig:
  """With an attention that several islands can be mapped over."""
  chosen = attention.choose(
    config.model.attention_implementation, mesh.devices.flat[0].platform
  )
  if config.islands == 1 or chosen != 'cudnn':
    return config
  model = dataclasses.replace(
    config.model, attention_implementation='cudnn_mapped'
  )
  return dataclasses.replace(config, model=model)


def _check_islands(config: DilocoConfig, mesh: Mesh) -> None:
  groups = mesh.shape['island']
  if config.islands % groups:
    raise ValueError(
      f'islands={config.islands} must be divisible by the {groups} device '
      'groups of mesh axis island; set mesh.island to a divisor of it and '
      'mesh.fsdp=-1.'
    )


def _resized(
  state: DilocoState, *, config: DilocoConfig, shardings: DilocoState
) -> DilocoState:
  if state.tokens_PM.shape[1] == config.islands:
    return state
  resize = functools.partial(
    state_lib.resize,
    num_islands=config.islands,
    has_own_outer=config.method in _OWN_OUTER,
  )
  return jax.jit(resize, out_shardings=shardings)(state)


def make_state(
  start: train_state.TrainState, setup: exchange.Setup, *, num_islands: int
) -> DilocoState:
  """State of step 0.

  Args:
    start: Of plain training.
    setup: The method's parts.
    num_islands: How many there are.
  """
  config = setup.config
  taken = [
    setup.fragments.take(start.params, p) for p in range(setup.fragments.count)
  ]
  if config.method == 'noloco':
    opt_states: list[Any] = [jax.tree.map(jnp.zeros_like, x) for x in taken]
  else:
    opt_states = [setup.optimizer.init(x) for x in taken]
  if config.method in _OWN_OUTER:
    opt_states = [state_lib.stack(x, num_islands) for x in opt_states]
  return state_lib.create(
    start,
    num_islands=num_islands,
    outer=tuple(opt_states),
    has_anchors=config.method != 'diloco',
    has_others=config.method == 'eager',
    has_residuals=config.compression.has_residual,
  )


class OuterPrograms:
  """The programs between inner steps: one for each event and fragment.

  Args:
    setup: The method's parts.
    shardings: Of the whole state.
  """

  def __init__(self, setup: exchange.Setup, shardings: DilocoState):
    self._setup = setup
    whole = shardings.step
    self._jit_state = functools.partial(
      jax.jit, donate_argnums=0, out_shardings=shardings
    )
    self._jit_round = functools.partial(
      jax.jit, donate_argnums=0, out_shardings=(shardings, whole)
    )
    self._programs: dict[tuple[str, int], Callable[..., Any]] = {}

  def __call__(
    self, state: DilocoState, event: Event
  ) -> tuple[DilocoState, typing.Metrics | None]:
    """Applies an event; 'send' gives metrics."""
    program = self.program(event.kind, event.fragment)
    reached_M = jnp.array(event.reached, bool)
    if event.kind == 'apply':
      return program(state), None
    if event.kind == 'join':
      return program(state, reached_M), None
    if event.partners:
      return program(state, reached_M, jnp.array(event.partners, jnp.int32))
    return program(state, reached_M)

  def program(self, kind: str, fragment: int) -> Callable[..., Any]:
    """The compiled-on-first-use program of an event."""
    name = (kind, fragment)
    if name not in self._programs:
      self._programs[name] = self._make(kind, fragment)
    return self._programs[name]

  def _make(self, kind: str, fragment: int) -> Callable[..., Any]:
    own, setup = self._setup.config.method, self._setup
    if kind == 'join':
      return self._jit_state(exchange.adopt)
    if kind == 'apply':
      return self._jit_state(
        functools.partial(exchange.apply, setup=setup, fragment=fragment)
      )
    if own == 'diloco':
      return self._jit_round(
        functools.partial(exchange.send, setup=setup, fragment=fragment)
      )
    round_of = {
      'eager': methods.send_eagerly,
      'noloco': methods.send_in_pairs,
      'delayed': methods.send_as_they_arrive,
    }[own]
    return self._jit_round(functools.partial(round_of, setup=setup))


def _sent_bytes(
  setup: exchange.Setup, abstract_params: typing.Params
) -> tuple[int, ...]:
  """Bytes an island sends of each fragment."""

  def encoded(params: typing.Params, fragment: int) -> typing.PyTree:
    taken = setup.fragments.take(params, fragment)
    return jax.tree.map(
      lambda x: compression.encode(x, setup.config.compression), taken
    )

  return tuple(
    compression.num_bytes(
      jax.eval_shape(functools.partial(encoded, fragment=p), abstract_params)
    )
    for p in range(setup.fragments.count)
  )
