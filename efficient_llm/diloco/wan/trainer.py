"""What an island trains with: the model, its inner state and its data."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from efficient_llm import sharding
from efficient_llm.data import iterator
from efficient_llm.diloco.wan import fragment_codec, shared_model
from efficient_llm.diloco.wan.config import IslandsConfig
from efficient_llm.diloco.wan.fragment_codec import Fragment
from efficient_llm.training import pretrain


@dataclasses.dataclass(frozen=True)
class Step:
  """What an inner step gave.

  Attributes:
    loss: In nats a token; None if it was not finite.
    tokens: Trained on.
  """

  loss: float | None
  tokens: float


class Trainer:
  """Makes inner steps; compiled once, its inner moments stay in memory.

  Args:
    config: The run.
    batches: Of the island's own data.
  """

  def __init__(self, config: IslandsConfig, batches: iterator.BatchIterator):
    self._batches = batches
    self._mesh = sharding.make_mesh(config.mesh)
    self._program = pretrain.build(config, self._mesh)
    with jax.set_mesh(self._mesh):
      self._state = self._program.init_state()
    self._fragments = shared_model.make_fragments(config)

  @property
  def position(self) -> int:
    """The batch after the last one trained on."""
    return int(self._batches.get_state()['next_step'])

  def begin(self, *, step: int, position: int) -> None:
    """Takes up a run.

    Args:
      step: Of the fastest island, which the learning rate follows.
      position: Batch of the island's data to go on with.
    """
    self._batches.seek(position)
    where = self._state.step.sharding
    self._state = self._state.replace(
      step=jax.device_put(np.int32(step), where)
    )

  def step(self) -> Step:
    """Makes an inner step."""
    batch = sharding.to_global(
      dict(next(self._batches)), sharding=self._program.batch_sharding
    )
    with jax.set_mesh(self._mesh):
      self._state, found = self._program.train_step(self._state, batch)
    loss, tokens, finite = jax.device_get(
      [found[name] for name in ('loss', 'tokens', 'finite')]
    )
    return Step(float(loss) if finite else None, float(tokens))

  def own(self, fragment: int) -> Fragment:
    """The island's parameters, on the host."""
    with jax.set_mesh(self._mesh):
      taken = self._fragments.take(self._state.params, fragment)
    with fragment_codec.on_cpu():
      return {
        name: np.asarray(jax.device_get(x), np.float32)
        for name, x in taken.items()
      }

  def put(self, fragment: int, values: Fragment, *, mixing: float) -> None:
    """Replaces the island's parameters.

    Args:
      fragment: Its number.
      values: The shared ones.
      mixing: Share of the island's own that stays.
    """
    with jax.set_mesh(self._mesh):
      params = self._mixed(
        self._state.params, values, mixing, fragment=fragment
      )
    self._state = self._state.replace(params=params)

  @functools.cached_property
  def _mixed(self) -> Any:
    fragments = self._fragments

    def mixed(
      params: Any, values: Fragment, mixing: Any, *, fragment: int
    ) -> Any:
      own = fragments.take(params, fragment)
      new = {
        name: mixing * own[name] + (1 - mixing) * x
        for name, x in values.items()
      }
      # So that values that are not finite are replaced as well.
      new = {
        name: jax.numpy.where(mixing > 0, x, values[name])
        for name, x in new.items()
      }
      return fragments.put(params, fragment, new)

    shardings = jax.tree.map(
      lambda x: x.sharding, self._program.abstract_state.params
    )
    return jax.jit(
      mixed,
      static_argnames='fragment',
      donate_argnums=0,
      out_shardings=shardings,
    )
