"""Which draft shape to use, by the number of live rows: bandits and a table.

All run on the host between stretches of rounds:

    shape = strategy.choose(num_live)
    ...
    strategy.update(shape, num_live, num_tokens, secs, num_rounds=16)
"""

import bisect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from efficient_llm.speculative import rewards, strategy_config
from efficient_llm.speculative import tree as tree_lib


class Strategy:
  """Chooses draft shapes and learns from how fast they were.

  Each bucket of live rows learns on its own and plays the arm that makes the
  most tokens per second. `rewards.Arms` bounds what trying other arms loses.

  'beg_mab' tries, with probability epsilon, one of the arms that have rested.
  It differs from TLT's: off is an arm, a bucket's arms need not have the same
  number of nodes, exploring is bounded, and the window counts stretches of all
  arms, so that a rarely tried arm is not judged by its past. The median is that
  of the time alone: of accepted lengths 1 and 9 in turn it would forget half.

  'ucb' plays the arm with the highest confidence bound among the best one and
  those that have rested, rewards taken as shares of the best.
  Source: Hu et al. 2025, BEG-MAB, arXiv:2511.16665; Auer et al. 2002, Figure 1.
  """

  def __init__(
    self,
    config: strategy_config.StrategyConfig,
    rng: np.random.Generator | None = None,
  ):
    """Starts without rewards.

    Args:
      config: Checked here.
      rng: Decides when 'beg_mab' explores; seeded with 0 by default.
    """
    config.validate()
    self._config = config
    self._rng = np.random.default_rng(0) if rng is None else rng
    # Off comes first: the first tries of other arms are held against it.
    always = () if config.name == 'fixed' else (tree_lib.DraftShape(),)
    self._shapes = tuple(
      {
        shape.name: shape
        for shape in (*always, *strategy_config.parse_shapes(entry))
      }
      for entry in config.arms
    )
    self._buckets = tuple(
      rewards.Arms(
        tuple(shapes),
        window=config.window,
        exploration=config.exploration,
        max_rest_secs=config.max_rest_secs,
      )
      for shapes in self._shapes
    )
    self._is_without_model = False

  def leave_out_model(self) -> None:
    """Chooses no shape any more that needs a draft model.

    What copies and off are left; where an entry has neither, off is chosen.
    What was learnt stays, and `to_dict` has all of it.
    """
    self._is_without_model = True
    for shapes, arms in zip(self._shapes, self._buckets, strict=True):
      arms.leave_out(
        frozenset(name for name, shape in shapes.items() if shape.needs_model)
      )

  def arms(
    self, batch_size: int | None = None
  ) -> tuple[tree_lib.DraftShape, ...]:
    """All shapes that may be chosen, so that they can be compiled before.

    Args:
      batch_size: Only those for so many live rows.
    """
    if batch_size is not None:
      return tuple(self._shapes[self._bucket(batch_size)].values())
    return tuple(dict.fromkeys(s for x in self._shapes for s in x.values()))

  def choose(self, batch_size: int) -> tree_lib.DraftShape:
    """The shape for the next stretch of rounds.

    Args:
      batch_size: Live rows.
    """
    bucket = self._bucket(batch_size)
    arms = self._buckets[bucket]
    name = arms.unseen()
    if name is None:
      estimates = arms.estimates()
      if not estimates:
        return tree_lib.DraftShape()
      off, margin = tree_lib.DraftShape().name, self._config.margin
      best = max(
        estimates,
        key=lambda name: estimates[name] * (1 + margin * (name == off)),
      )
      rested = [n for n in estimates if n != best and arms.is_rested(n)]
      if self._config.name == 'ucb':
        worth = arms.upper_bounds(self._config.ucb_width)
        name = max([best, *rested], key=lambda n: worth[n])
      elif self._rng.random() < self._config.epsilon and rested:
        name = rested[self._rng.integers(len(rested))]
      else:
        name = best
    return self._shapes[bucket][name]

  def tokens_per_sec(
    self, shape: tree_lib.DraftShape, batch_size: int
  ) -> float | None:
    """What a shape has made so far with so many live rows; None if untried."""
    bucket = self._buckets[self._bucket(batch_size)]
    of_a_row = bucket.estimates().get(shape.name)
    return None if of_a_row is None else batch_size * of_a_row

  def update(
    self,
    shape: tree_lib.DraftShape,
    batch_size: int,
    accepted_tokens: int,
    secs: float,
    *,
    num_rounds: int = 1,
    num_passes: int | None = None,
    compiled: bool = False,
  ) -> None:
    """Learns from a stretch of rounds.

    Args:
      shape: What was chosen.
      batch_size: What it was chosen for; nothing is learnt where it is 0.
      accepted_tokens: New tokens of rows while they were live.
      secs: Wall time, with the device waited for.
      num_rounds: Rounds of the stretch.
      num_passes: Rounds of each row while it was live, summed over rows; by
        default all rows lived through all rounds.
      compiled: Whether `secs` holds a compilation: then nothing is learnt.
    Raises:
      ValueError: If the shape is no arm for this batch size, or a number is
        out of range.
    """
    if compiled or not batch_size:
      return
    bucket = self._bucket(batch_size)
    if shape.name not in self._shapes[bucket]:
      if shape.is_off and self._is_without_model:
        return
      raise ValueError(
        f'Shape {shape.name} is no arm for {batch_size=}; choose among '
        f'{", ".join(self._shapes[bucket])}.'
      )
    if num_passes is None:
      num_passes = batch_size * num_rounds
    if not 0 < secs < math.inf or min(num_rounds, num_passes) < 1:
      raise ValueError(
        f'{secs=}, {num_rounds=} and {num_passes=} must be positive; leave out '
        'stretches without rounds.'
      )
    if accepted_tokens < 0:
      raise ValueError(
        f'{accepted_tokens=} must be 0 or more; count new tokens of live rows.'
      )
    self._buckets[bucket].learn(
      shape.name, accepted_tokens / num_passes, num_rounds / secs, secs
    )

  def to_dict(self) -> dict[str, Any]:
    """What `from_dict` goes on from; plain values for JSON."""
    return {
      'name': self._config.name,
      'thresholds': list(self._config.thresholds),
      'buckets': [arms.to_dict() for arms in self._buckets],
      'rng': self._rng.bit_generator.state,
    }

  @classmethod
  def from_dict(
    cls, config: strategy_config.StrategyConfig, saved: Mapping[str, Any]
  ) -> 'Strategy':
    """Goes on from what `to_dict` gave; see `restore`."""
    strategy = cls(config)
    strategy.restore(saved)
    return strategy

  def restore(self, saved: Mapping[str, Any]) -> None:
    """Takes over what `to_dict` gave.

    Args:
      saved: Of a strategy with the name, arms and thresholds of this one.
    Raises:
      ValueError: If it is of another configuration or damaged.
    """
    try:
      was = (saved['name'], tuple(saved['thresholds']))
      if was != (self._config.name, self._config.thresholds):
        raise ValueError(f'it is {was[0]!r} with thresholds {was[1]}')
      self._rng.bit_generator.state = saved['rng']
      for arms, bucket in zip(self._buckets, saved['buckets'], strict=True):
        arms.restore(bucket)
    except (
      AttributeError,
      KeyError,
      OverflowError,
      TypeError,
      ValueError,
    ) as error:
      raise ValueError(
        f'The saved strategy does not fit the configuration '
        f'({type(error).__name__}: {error}); start without it.'
      ) from error

  def _bucket(self, batch_size: int) -> int:
    if batch_size < 1:
      raise ValueError(f'{batch_size=} must be at least 1, the live rows.')
    return bisect.bisect_right(self._config.thresholds, batch_size) - 1
