"""Islands without training: what they say is made up, the hub is the real."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from efficient_llm.diloco.wan import exchange as exchange_lib
from efficient_llm.diloco.wan import hub as hub_lib
from efficient_llm.diloco.wan import shared_model
from efficient_llm.diloco.wan.config import IslandsConfig, RoundConfig
from efficient_llm.diloco.wan.exchange import Exchange
from efficient_llm.training import checkpoint, loop
from tests import tiny

SIGNS = {'step': 1, 'loss': 2.0, 'speed': None, 'spans': [], 'clock': 0.0}


def config(**changes: Any) -> IslandsConfig:
  """Eight rounds of ten steps."""
  rounds = RoundConfig(grace_secs=10.0, deadline_secs=60.0, patience_secs=100.0)
  return IslandsConfig(
    **{
      'model': tiny.SMALL_VOCAB,
      'loop': loop.LoopConfig(
        num_steps=80,
        checkpoint=checkpoint.CheckpointConfig(
          every_steps=1, asynchronous=False
        ),
      ),
      'sync_period': 10,
      'rounds': rounds,
      **changes,
    }
  )


class Talk:
  """A hub, a clock and islands that are told what to say.

  Args:
    config: The run.
    workdir: Of the hub.
  """

  def __init__(self, config: IslandsConfig, workdir: pathlib.Path):
    self.config, self.workdir = config, workdir
    workdir.mkdir(exist_ok=True)
    self.now = 0.0
    self.hub = hub_lib.Hub(config, workdir, clock=lambda: self.now)
    self.islands: dict[str, Exchange] = {}
    self.position: dict[str, int] = {}

  def restart(self) -> None:
    """The hub is killed and started again; nothing is saved at its end."""
    self.hub = hub_lib.Hub(self.config, self.workdir, clock=lambda: self.now)

  def join(self, name: str) -> exchange_lib.Orders:
    """An island comes, or comes back, and is welcomed."""
    if name not in self.islands:
      params = shared_model.initial_params(self.config)
      self.islands[name] = Exchange(
        self.config, shared_model.cut(self.config, params)
      )
    self.hub.appeared(name)
    assert self.hear(name).kind == 'greet'
    self.hub.receive(name, self.islands[name].hello(SIGNS))
    is_new = name not in self.position
    orders = self.hear(name)
    if is_new and orders.kind == 'welcome':
      self.position[name] = orders.position
      self.islands[name].begin_at(orders.position)
    return orders

  def hear(self, name: str) -> exchange_lib.Orders:
    """An island takes what the hub has to tell it."""
    frame = self.hub.next_message(name)
    assert frame is not None
    return self.islands[name].take(frame, position=self.position.get(name, 0))

  def train(self, name: str, *, steps: int = 10) -> None:
    """An island makes steps."""
    for _ in range(steps):
      self.islands[name].trained(64.0)
    self.position[name] = self.position.get(name, 0) + steps

  def update(
    self, name: str, *, scale: float = 0.01, fragment: int = 0
  ) -> bytes:
    """What an island says that has moved in a direction of its own."""
    theta = self.islands[name].theta_P[fragment]
    seed = self.position[name]
    own = {
      leaf: x - scale * direction(leaf, x.shape, name, seed)
      for leaf, x in theta.items()
    }
    return self.islands[name].update(
      fragment, own, position=self.position[name], signs=SIGNS
    )

  def send(self, name: str, *, steps: int = 10, **changes: Any) -> bytes:
    """An island trains and sends; gives what it said."""
    self.train(name, steps=steps)
    frame = self.update(name, **changes)
    self.hub.receive(name, frame)
    return frame

  def round(self, *names: str, **changes: Any) -> None:
    """Islands send, the round closes, and they hear what came of it."""
    for name in names:
      self.send(name, **changes)
    assert self.hub.tick()
    for name in names:
      self.hear(name)


def with_rounds(config: IslandsConfig, **changes: Any) -> IslandsConfig:
  """The configuration with another rule for rounds."""
  rounds = dataclasses.replace(config.rounds, **changes)
  return dataclasses.replace(config, rounds=rounds)


def direction(
  leaf: str, shape: tuple[int, ...], name: str, seed: int
) -> np.ndarray:
  """Mostly the same for all islands, and a little their own.

  Args:
    leaf: Of the model.
    shape: Its shape.
    name: Of the island.
    seed: Another one gives another little.
  """
  common = np.random.default_rng([len(leaf), 7]).normal(size=shape)
  own = np.random.default_rng([len(leaf), seed, *name.encode()]).normal(
    size=shape
  )
  return (common + 0.3 * own).astype(np.float32)


def same(a: Any, b: Any) -> bool:
  """Whether two trees have the same bits."""
  equal = jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)
  return all(jax.tree.leaves(equal))
