"""Tests of syncs on a toy: fragments, overlap, mixing, bad islands, absence."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm.diloco import compression, fragments, schedule, screening
from efficient_llm.diloco.config import DilocoConfig, MembershipConfig
from tests.diloco import toy_islands

_RATE, _MOMENTUM = 0.7, 0.9


def _assert_close(one: Any, other: Any) -> None:
  # Sums of a few float32 of size 1.
  np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def _homes(count: int) -> np.ndarray:
  """The fragment of every number of the toy, in the order of `flat`."""
  # Leaves come by name: embedding, final_norm, layers; layers are strided.
  layers = [layer % count for layer in range(toy_islands.NUM_LAYERS)]
  return np.array([0] * 4 + [count - 1] * 3 + list(np.repeat(layers, 2)))


def _streaming(
  config: DilocoConfig,
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Shared and island parameters after each step, as published.

  Written anew with vectors and loops, so that it shares nothing with the code.
  """
  count, period = config.fragments.count, config.sync_period
  overlap, mixing = config.fragments.overlap_steps, config.fragments.mixing
  num_steps = config.loop.num_steps
  shared = toy_islands.flat(toy_islands.params()).astype(np.float64)
  local = np.stack([shared] * config.islands)
  momentum = np.zeros_like(shared)
  home, under_way = _homes(count), {}
  trace = []

  def send(p: int) -> None:
    mine = home == p
    delta = shared[mine] - local[:, mine].mean(0)
    momentum[mine] = _MOMENTUM * momentum[mine] + delta
    shared[mine] -= _RATE * (delta + _MOMENTUM * momentum[mine])

  def apply(p: int) -> None:
    mine = home == p
    local[:, mine] = mixing * local[:, mine] + (1 - mixing) * shared[mine]

  for step in range(1, num_steps + 1):
    for m in range(config.islands):
      local[m] += toy_islands.flat(toy_islands.random_moves(step, m))
    for p in range(count):
      is_due = step % period == (p * period // count) % period
      is_due &= step >= (period if p == 0 else 1)
      if under_way.get(p) == step:
        apply(p)
        del under_way[p]
      if step == num_steps:
        if p in under_way:
          apply(p)
        send(p)
        apply(p)
      elif is_due:
        send(p)
        under_way[p] = step + overlap
        if overlap == 0:
          apply(p)
          del under_way[p]
    trace.append((shared.copy(), local.copy()))
  return trace


@pytest.mark.parametrize('count', [1, 2, 3])
@pytest.mark.parametrize('overlap_steps', [0, 1, 3])
@pytest.mark.parametrize('mixing', [0.0, 0.5])
def test_streaming_follows_the_published_algorithm(
  count: int, overlap_steps: int, mixing: float
) -> None:
  config = toy_islands.config(
    num_steps=13,
    fragments=fragments.FragmentConfig(count, overlap_steps, mixing),
  )
  expected = _streaming(config)
  for (state, _), (shared, local) in zip(
    toy_islands.walk(config), expected, strict=True
  ):
    _assert_close(toy_islands.flat(state.params), shared)
    _assert_close(toy_islands.flat_islands(state.islands.params), local)


def test_mixing_1_leaves_islands_to_themselves() -> None:
  config = toy_islands.config(fragments=fragments.FragmentConfig(1, 0, 1.0))
  state = toy_islands.last(config)
  own = toy_islands.flat(toy_islands.params()) + sum(
    toy_islands.flat(toy_islands.random_moves(step, 1)) for step in range(1, 9)
  )
  _assert_close(toy_islands.flat_islands(state.islands.params)[1], own)


def test_islands_count_by_their_tokens() -> None:
  config = toy_islands.config(num_steps=4)
  state = toy_islands.last(config, tokens=lambda m: [3.0, 1.0][m])
  old = toy_islands.flat(toy_islands.params())
  moved = [
    sum(
      toy_islands.flat(toy_islands.random_moves(step, m))
      for step in range(1, 5)
    )
    for m in range(2)
  ]
  mean = 0.75 * moved[0] + 0.25 * moved[1]
  _assert_close(toy_islands.flat(state.params), old + 1.33 * mean)


def test_permuting_islands_changes_nothing_but_rounding() -> None:
  config = toy_islands.config(islands=3)
  order = [2, 0, 1]

  def moves(step: int, m: int) -> Any:
    return toy_islands.random_moves(step, order[m])

  one, other = toy_islands.last(config), toy_islands.last(config, moves)
  _assert_close(toy_islands.flat(one.params), toy_islands.flat(other.params))


@pytest.mark.parametrize('format', ['float16', 'int8', 'int4', 'e3m0'])
def test_all_islands_apply_the_same_bits_and_owe_the_rest(
  format: compression.Format,
) -> None:
  config = toy_islands.config(
    num_steps=4,
    islands=3,
    compression=compression.CompressionConfig(format),
  )
  state = toy_islands.last(config)
  for island in toy_islands.flat_islands(state.islands.params):
    np.testing.assert_array_equal(island, toy_islands.flat(state.params))
  # What was sent and what is owed make up what happened.
  old = toy_islands.flat(toy_islands.params())
  sent = (old - toy_islands.flat(state.params)) / 1.33
  owed = toy_islands.flat_islands(state.residuals).mean(0)
  moved = sum(
    toy_islands.flat(toy_islands.random_moves(step, m)) / 3
    for step in range(1, 5)
    for m in range(3)
  )
  _assert_close(sent + owed, -moved)
  assert np.abs(owed).max() > 0


def _spoilt(factor: float) -> toy_islands.Moves:
  """Islands that agree, but the last one is bad in the first round."""

  def moves(step: int, island: int) -> Any:
    rng = np.random.default_rng(step)
    return jax.tree.map(
      lambda x: (
        (0.2 + 0.02 * rng.normal(size=x.shape))
        * (factor if island == 3 and step <= 4 else 1)
      ).astype(np.float32),
      toy_islands.params(),
    )

  return moves


@pytest.mark.parametrize(
  ('factor', 'reason'),
  [
    (np.nan, 'not finite'),
    (np.inf, 'not finite'),
    (100.0, 'too large'),
    (-1.0, 'against the rest'),
  ],
)
@pytest.mark.parametrize('count', [1, 2])
def test_a_bad_island_is_refused_and_healed(
  factor: float, reason: str, count: int
) -> None:
  config = toy_islands.config(
    num_steps=12,
    islands=4,
    fragments=fragments.FragmentConfig(count),
    screening=screening.ScreeningConfig(min_cosine=0.0),
  )
  trace = list(toy_islands.walk(config, _spoilt(factor)))
  rounds = [found for _, rounds in trace for found in rounds]
  first = [screening.REASONS[code] for code in rounds[0]['codes_M']]
  assert first == ['accepted'] * 3 + [reason]
  assert (rounds[-1]['codes_M'] == 0).all()
  without = dataclasses.replace(config, islands=3)
  # The others, who all go the same way, never notice.
  _assert_close(
    toy_islands.flat(trace[3][0].params)[_homes(count) == 0],
    toy_islands.flat(
      list(toy_islands.walk(without, _spoilt(1.0)))[3][0].params
    )[_homes(count) == 0],
  )
  assert np.isfinite(toy_islands.flat(trace[-1][0].params)).all()
  assert np.isfinite(
    toy_islands.flat_islands(trace[-1][0].islands.params)
  ).all()


def test_an_update_sent_again_is_refused() -> None:
  config = toy_islands.config()
  state, programs = toy_islands.start(config)
  event = schedule.Event('send', reached=(True, True))

  def with_delta(state: Any) -> Any:
    islands = jax.tree.map(
      lambda x: np.stack([np.zeros_like(x), np.ones_like(x) * 0.5]),
      toy_islands.params(),
    )
    shared = jax.tree.map(np.ones_like, toy_islands.params())
    return state.replace(
      params=shared,
      islands=state.islands.replace(params=islands),
      tokens_PM=np.ones_like(state.tokens_PM),
    )

  state, first = programs(with_delta(state), event)
  assert first is not None
  assert first['codes_M'].tolist() == [0, 0]
  _, second = programs(with_delta(state), event)
  assert second is not None
  names = [screening.REASONS[code] for code in second['codes_M']]
  assert names == ['replayed', 'replayed']


def test_an_island_that_misses_a_sync_goes_on_from_its_own_parameters() -> None:
  config = toy_islands.config(
    num_steps=9,
    islands=4,
    seed=1,
    membership=MembershipConfig(drop_probability=0.5),
  )
  trace = list(toy_islands.walk(config))
  state, (found,) = trace[3][0], trace[3][1]
  sent = found['sent_M']
  assert 0 < sent.sum() < 4
  own = toy_islands.flat_islands(state.islands.params)
  shared = toy_islands.flat(state.params)
  assert (own == shared).all(1).tolist() == sent.tolist()
  # What it trained on still counts when it next sends.
  assert (state.tokens_PM[0] == np.where(sent, 0, 4)).all()


def test_an_absent_island_neither_trains_nor_counts_and_comes_back() -> None:
  config = toy_islands.config(
    num_steps=12,
    islands=3,
    membership=MembershipConfig(absences=('1:3:6',)),
  )
  trace = list(toy_islands.walk(config))
  before, during, after = (trace[i][0] for i in (1, 4, 8))
  for leaf in ('embedding', 'layers'):
    np.testing.assert_array_equal(
      before.islands.params[leaf]['w'][1], during.islands.params[leaf]['w'][1]
    )
  assert trace[3][1][0]['sent_M'].tolist() == [True, False, True]
  # It starts its first step from what is shared by then.
  back = trace[6][0].islands.params['embedding']['w'][1]
  step = toy_islands.random_moves(7, 1)['embedding']['w']
  shared = trace[5][0].params['embedding']['w']
  _assert_close(back, shared + step)
  assert after.tokens_PM[0, 1] == 1


def test_a_sync_that_nobody_reaches_changes_nothing() -> None:
  config = toy_islands.config(
    num_steps=9,
    membership=MembershipConfig(absences=('0:4:4', '1:4:4'), rejoin='keep'),
  )
  trace = list(toy_islands.walk(config))
  np.testing.assert_array_equal(
    toy_islands.flat(trace[3][0].params),
    toy_islands.flat(toy_islands.params()),
  )
  assert trace[3][0].versions_P.tolist() == [0]
  assert trace[8][0].versions_P.tolist() == [2]
