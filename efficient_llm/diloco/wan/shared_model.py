"""What the hub owns of the model: parameters, momentum, versions, by fragment.

The hub moves its parameters by what its message says, not by what it computed:
a move is encoded once, and hub and islands add the same decoded values. What
the format could not express is owed, and sent with the next move.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficient_llm import typing
from efficient_llm.diloco import fragments as fragments_lib
from efficient_llm.diloco import outer, screening
from efficient_llm.diloco.wan import fragment_codec
from efficient_llm.diloco.wan.config import IslandsConfig
from efficient_llm.diloco.wan.fragment_codec import Fragment
from efficient_llm.models import transformer

# Compiled once, by hub and islands that are in one process.
_init = jax.jit(transformer.init, static_argnums=0)
# Versions whose digests and moves are remembered.
_DIGESTS_KEPT, _MOVES_KEPT = 16, 2


def initial_params(config: IslandsConfig) -> typing.Params:
  """The parameters of step 0, made on the CPU for the same bits everywhere."""
  with fragment_codec.on_cpu():
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    return jax.device_get(_init(config.model, init_key))


def make_fragments(config: IslandsConfig) -> fragments_lib.Fragments:
  """How the model is cut."""
  return fragments_lib.Fragments(
    config.fragments,
    transformer.logical_axes(config.model),
    num_layers=config.model.num_layers,
  )


def cut(config: IslandsConfig, params: typing.Params) -> list[Fragment]:
  """The fragments of parameters on the host, as copies of their own."""
  fragments = make_fragments(config)
  return [
    {
      name: np.array(x, np.float32)
      for name, x in fragments.take(params, p).items()
    }
    for p in range(config.fragments.count)
  ]


def join(config: IslandsConfig, theta_P: Sequence[Fragment]) -> typing.Params:
  """The parameters that were cut, on the host."""
  fragments = make_fragments(config)
  with fragment_codec.on_cpu():
    params = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.float32),
      transformer.abstract_params(config.model),
    )
    for p, values in enumerate(theta_P):
      params = fragments.put(params, p, values)
    return jax.device_get(params)


def layout(theta_P: Sequence[Fragment]) -> str:
  """Hash of the names and shapes of all fragments."""
  shapes = [sorted(fragment_codec.shapes_of(x).items()) for x in theta_P]
  return hashlib.sha256(repr(shapes).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Merged:
  """What came of the updates of a round.

  Attributes:
    verdict: What was found of each.
    moved: Norm of the move; None if nothing moved.
    num_bytes: Of the move as it is sent.
  """

  verdict: screening.Verdict
  moved: float | None
  num_bytes: int


@functools.lru_cache
def _merging(
  config: outer.OuterConfig,
  screening_config: screening.ScreeningConfig,
  *,
  num_islands: int,
  is_sparse: bool,
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
  """The outer optimiser, and the program that judges updates and merges them.

  It compiles once for the shapes of a fragment and a number of updates.
  """
  optimizer = outer.make_optimizer(config, num_islands=num_islands)
  mean = screening.merger(screening_config)
  if is_sparse and screening_config.merge == 'mean':
    mean = outer.mean_where_sent

  @jax.jit
  def merge(
    state: outer.OuterState,
    deltas: Sequence[Fragment],
    weights_M: jax.Array,
    seen_MR: jax.Array,
  ) -> tuple[screening.Verdict, Fragment, Any]:
    deltas_M = outer.stacked(deltas)
    # All are judged, those without a weight as well.
    verdict = screening.judge(
      deltas_M, jnp.ones(len(deltas)), seen_MR, screening_config
    )
    new = outer.outer_step(
      state,
      deltas_M,
      jnp.where(verdict.codes_M > 0, 0.0, weights_M),
      optimizer=optimizer,
      merge=mean,
    )
    wanted = jax.tree.map(jnp.subtract, new.params, state.params)
    return verdict, wanted, new.opt_state

  return optimizer, merge


class SharedModel:
  """Parameters, outer state and versions of all fragments.

  Args:
    config: The run.
    theta_P: Initial parameters by fragment.
  """

  def __init__(self, config: IslandsConfig, theta_P: Sequence[Fragment]):
    self._config = config
    optimizer, self._merge = _merging(
      config.outer,
      config.screening,
      num_islands=config.islands,
      is_sparse=config.compression.density is not None,
    )
    self.shapes_P = [fragment_codec.shapes_of(x) for x in theta_P]
    self.down = fragment_codec.Codec(config.down_compression, self.shapes_P)
    self.theta_P = list(theta_P)
    with fragment_codec.on_cpu():
      self._opt_P = [jax.device_get(optimizer.init(x)) for x in self.theta_P]
    self._owed_P: list[Fragment | None] = [
      jax.tree.map(np.zeros_like, x)
      if config.down_compression.has_residual
      else None
      for x in self.theta_P
    ]
    self.versions_P = [0] * len(self.theta_P)
    self._forget()

  def _forget(self) -> None:
    """Knows no version but the present ones."""
    self.digests_P: list[dict[int, str]] = [
      {version: fragment_codec.digest(x)}
      for version, x in zip(self.versions_P, self.theta_P, strict=True)
    ]
    self._moves_P: list[dict[int, dict[str, np.ndarray]]] = [
      {} for _ in self.theta_P
    ]

  def digest(self, fragment: int) -> str:
    """Of a fragment as it is now."""
    return self.digests_P[fragment][self.versions_P[fragment]]

  def merge(
    self,
    fragment: int,
    deltas: Sequence[Fragment],
    weights: Sequence[float],
    seen_MR: np.ndarray,
  ) -> Merged:
    """Judges updates and steps a fragment with those that are accepted.

    Args:
      fragment: Its number.
      deltas: Decoded updates.
      weights: Their tokens; 0 for an update that is judged but not used.
      seen_MR: Fingerprints of their senders' earlier updates, uint32.
    """
    with fragment_codec.on_cpu():
      verdict, wanted, opt_state = jax.device_get(
        self._merge(
          outer.OuterState(
            self.theta_P[fragment], self._opt_P[fragment], jnp.int32(0)
          ),
          tuple(deltas),
          np.asarray(weights, np.float32),
          np.asarray(seen_MR, np.uint32),
        )
      )
    if not ((verdict.codes_M == 0) & (np.asarray(weights) > 0)).any():
      return Merged(verdict, None, 0)
    arrays, move, owed = self.down.compress(wanted, self._owed_P[fragment])
    if not all(np.isfinite(x).all() for x in move.values()):
      raise FloatingPointError(f'the move of fragment {fragment} is not finite')
    self._opt_P[fragment], self._owed_P[fragment] = opt_state, owed
    self.theta_P[fragment] = fragment_codec.added(self.theta_P[fragment], move)
    self.versions_P[fragment] += 1
    version = self.versions_P[fragment]
    self.digests_P[fragment][version] = fragment_codec.digest(
      self.theta_P[fragment]
    )
    self._moves_P[fragment][version] = arrays
    self.digests_P[fragment].pop(version - _DIGESTS_KEPT, None)
    self._moves_P[fragment].pop(version - _MOVES_KEPT, None)
    return Merged(
      verdict, float(optax.tree.norm(move)), self.down.num_bytes(fragment)
    )

  def part(
    self, fragment: int, known_version: int
  ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What an island needs to have a fragment's present version.

    Args:
      fragment: Its number.
      known_version: What the island has; a move where one suffices.

    Returns:
      What is said of it, and arrays whose names begin with its number.
    """
    version = self.versions_P[fragment]
    move = self._moves_P[fragment].get(version)
    form = 'move' if move and known_version == version - 1 else 'whole'
    arrays = self.theta_P[fragment] if form == 'whole' else move or {}
    fields = {
      'fragment': fragment,
      'version': version,
      'form': form,
      'digest': self.digest(fragment),
    }
    return fields, {f'{fragment}/{name}': x for name, x in arrays.items()}

  def tree(self) -> dict[str, Any]:
    """All arrays, as a checkpoint holds them: the parameters as any run's."""
    tree: dict[str, Any] = {
      'params': join(self._config, self.theta_P),
      'opt_state': self._opt_P,
    }
    if self._config.down_compression.has_residual:
      tree['owed'] = self._owed_P
    return tree

  def find(self, fragment: int, digest: str) -> int:
    """The version of a fragment that has a digest; -1 for none known."""
    known = self.digests_P[fragment]
    return next((v for v, found in known.items() if found == digest), -1)

  def restore(
    self,
    tree: dict[str, Any],
    versions_P: Sequence[int],
    digests_P: Sequence[Mapping[Any, str]],
  ) -> None:
    """Goes on from what `tree` gave.

    Args:
      tree: All arrays.
      versions_P: Of the fragments.
      digests_P: By version, those of the last ones; JSON makes text of them.
    """
    self.theta_P = cut(self._config, tree['params'])
    self._opt_P = list(tree['opt_state'])
    if 'owed' in tree:
      self._owed_P = list(tree['owed'])
    self.versions_P = list(versions_P)
    self._forget()
    for digests, known in zip(self.digests_P, digests_P, strict=True):
      digests |= {int(version): digest for version, digest in known.items()}
