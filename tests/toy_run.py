"""A training run on a model that compiles in no time, for tests of the loop."""

import functools
import pathlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding
from efficient_llm.training import (
  checkpoint,
  loop,
  metrics,
  objectives,
  state,
  step,
)

_OPTIMIZER = optimizer_lib.Optimizer(optax.adam(0.1), lambda _: 0.1)

# What depends on the clock, so no two runs agree in it.
_CLOCK = {'time', 'step_secs', 'tokens_per_sec', 'mfu'}


class Crash(Exception):
  """Stands for whatever ends a process without warning."""


class Batches:
  """Random rows, by step; something may happen before one is handed out."""

  def __init__(self, happenings: Mapping[int, Callable[[], Any]]) -> None:
    self.happenings = dict(happenings)
    self.next_step = 0

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    self.next_step += 1
    x = np.random.default_rng(self.next_step).normal(size=(4, 3))
    if happening := self.happenings.get(self.next_step):
      x = x * (happening() or 1)
    return {'x': x.astype(np.float32)}

  def get_state(self) -> dict[str, Any]:
    return {'next_step': self.next_step, 'next_example': 4 * self.next_step}

  def set_state(self, state: Mapping[str, Any]) -> None:
    self.next_step = state['next_step']


def _loss(params: Any, batch: Any, key: jax.Array) -> objectives.Loss:
  noise = 0.01 * jax.random.normal(key, (3,))
  errors = jnp.square(params['w'] + noise - batch['x'])
  weight = jnp.float32(batch['x'].shape[0])
  return objectives.Loss(errors.sum(), weight, {'worst': errors.max() * weight})


def _make_state() -> state.TrainState:
  return state.create({'w': jnp.zeros(3)}, _OPTIMIZER, jax.random.key(3))


@functools.cache
def jitted(skip_nonfinite: bool) -> step.TrainStep:
  train_step = step.make_train_step(
    _loss, _OPTIMIZER, skip_nonfinite=skip_nonfinite
  )
  return jax.jit(train_step, donate_argnums=0)


def evaluate(state: state.TrainState) -> dict[str, float]:
  return {'loss': float(jnp.square(state.params['w']).sum())}


def run(
  workdir: pathlib.Path,
  *,
  happenings: Mapping[int, Callable[[], Any]] | None = None,
  every_steps: int = 4,
  task: Mapping[str, Any] | None = None,
  **config: Any,
) -> loop.Outcome:
  """Ten steps, a line every three, evaluated every five, saved every four."""
  fields = {'num_steps': 10, 'log_every': 3, 'eval_every': 5, **config}
  loop_config = loop.LoopConfig(
    tensorboard=False,
    checkpoint=checkpoint.CheckpointConfig(
      every_steps=every_steps, max_to_keep=20
    ),
    **fields,
  )
  loop_config.validate()
  mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
  whole = sharding.replicated(mesh)
  return loop.run(
    loop_config,
    loop.Task(
      **{
        'title': 'toy',
        'step': jitted(loop_config.nonfinite == 'skip'),
        'batches': Batches(happenings or {}),
        'place': lambda batch: jax.device_put(batch, whole),
        'evaluate': evaluate,
        'metadata': {'config': {'name': 'toy', 'loop': {'num_steps': 10}}},
        **(task or {}),
      }
    ),
    make_state=lambda: jax.device_put(_make_state(), whole),
    abstract_state=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
      jax.eval_shape(_make_state),
    ),
    workdir=workdir,
  )


def lines(workdir: pathlib.Path, kind: str | None = None) -> list[Any]:
  return [
    {name: value for name, value in line.items() if name not in _CLOCK}
    for line in metrics.read_metrics(workdir, kind=kind)
  ]


def saved_steps(workdir: pathlib.Path) -> list[int]:
  folders = (workdir / 'checkpoints').iterdir()
  return sorted(int(path.name) for path in folders if path.name.isdecimal())


def crash() -> None:
  raise Crash


def sigterm() -> None:
  signal.raise_signal(signal.SIGTERM)
