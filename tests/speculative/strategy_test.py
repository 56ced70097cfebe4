"""Strategies in simulation and their saved states.

Over 300 lines: the simulations share one clock and one set of arms.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from efficient_llm.speculative import strategy as strategy_lib
from efficient_llm.speculative import strategy_config, tree

_OFF, _SHORT, _LONG = (
  tree.DraftShape(),
  tree.DraftShape(2, 1, 3),
  tree.DraftShape(4, 1, 5),
)
_TWO_ARMS = strategy_config.StrategyConfig(
  arms=('2_1_3+4_1_5',), thresholds=(1,)
)
_BANDITS = ('beg_mab', 'ucb')

Speeds = Mapping[tree.DraftShape, float]


def _strategy(
  name: Any = 'beg_mab', *, seed: int = 0, **more: Any
) -> strategy_lib.Strategy:
  config = strategy_config.StrategyConfig(
    name, _TWO_ARMS.arms, _TWO_ARMS.thresholds, **more
  )
  return strategy_lib.Strategy(config, np.random.default_rng(seed))


def _play(
  strategy: strategy_lib.Strategy,
  speeds: Speeds,
  num_stretches: int,
  *,
  is_token_fixed: bool = False,
  noise: Callable[[], float] = lambda: 1.0,
) -> tuple[float, list[tree.DraftShape]]:
  """Tokens per second of all stretches together, and what was chosen.

  Every stretch takes a second, or makes 100 tokens.
  """
  num_tokens, num_secs, chosen = 0.0, 0.0, []
  for _ in range(num_stretches):
    shape = strategy.choose(1)
    speed = 100 * speeds[shape] * noise()
    tokens, secs = (100.0, 100 / speed) if is_token_fixed else (speed, 1.0)
    strategy.update(shape, 1, round(tokens), secs)
    num_tokens, num_secs = num_tokens + tokens, num_secs + secs
    chosen.append(shape)
  return num_tokens / num_secs / 100, chosen


@pytest.mark.parametrize('name', _BANDITS)
@pytest.mark.parametrize('is_token_fixed', [False, True])
def test_bad_arms_cost_less_than_three_percent(
  name: str, is_token_fixed: bool
) -> None:
  speeds = {_OFF: 1.0, _SHORT: 0.5, _LONG: 0.3}
  speed, _ = _play(_strategy(name), speeds, 2000, is_token_fixed=is_token_fixed)
  assert speed >= 0.97


@pytest.mark.parametrize('name', _BANDITS)
@pytest.mark.parametrize('is_token_fixed', [False, True])
def test_a_good_arm_is_used_almost_always(
  name: str, is_token_fixed: bool
) -> None:
  speeds = {_OFF: 1.0, _SHORT: 0.5, _LONG: 2.0}
  speed, _ = _play(_strategy(name), speeds, 2000, is_token_fixed=is_token_fixed)
  assert speed >= 0.97 * 2


@pytest.mark.parametrize('name', _BANDITS)
@pytest.mark.parametrize('exploration', [0.005, 0.02, 0.1])
def test_exploring_loses_no_more_than_its_bound(
  name: str, exploration: float
) -> None:
  speeds = {_OFF: 1.0, _SHORT: 0.5, _LONG: 0.05}
  num_stretches = 3000
  for seed in range(5):
    strategy = _strategy(name, seed=seed, exploration=exploration)
    _, chosen = _play(strategy, speeds, num_stretches)
    lost = sum(1 - speeds[shape] for shape in chosen)
    assert lost <= exploration * num_stretches + 0.5 + 0.95
    # The bound is not held by leaving the arms alone.
    assert {_SHORT, _LONG} <= set(chosen[num_stretches // 2 :])


@pytest.mark.parametrize('name', _BANDITS)
def test_noise_does_not_make_speculation_lose(name: str) -> None:
  speeds = {_OFF: 1.0, _SHORT: 0.5, _LONG: 0.8}
  for seed in range(5):
    rng = np.random.default_rng(seed)
    speed, _ = _play(
      _strategy(name, seed=seed),
      speeds,
      2000,
      noise=functools.partial(rng.lognormal, 0, 0.1),
    )
    assert speed >= 0.97 * np.exp(0.1**2 / 2)


@pytest.mark.parametrize('name', _BANDITS)
def test_it_adapts_within_the_stated_stretches_when_speeds_swap(
  name: str,
) -> None:
  before = {_OFF: 1.0, _SHORT: 0.5, _LONG: 2.0}
  after = {_OFF: 1.0, _SHORT: 2.0, _LONG: 0.5}
  # window + (n - 1) * (c / s / exploration + 3 / epsilon) of `rewards.Arms`:
  # a try of the slow arm lost 1 - 0.5 / 2.
  stated = 32 + 2 * (0.75 / 0.01 + 3 / 0.1)
  waits = []
  for seed in range(20):
    strategy = _strategy(name, seed=seed)
    _play(strategy, before, 500)
    _, chosen = _play(strategy, after, 1000)
    assert np.mean([shape == _SHORT for shape in chosen[-200:]]) > 0.9
    runs = np.convolve([shape == _SHORT for shape in chosen], np.ones(10))
    waits.append(np.argmax(runs == 10))
  assert np.mean(waits) <= stated


def test_every_arm_is_tried_before_one_is_preferred() -> None:
  _, chosen = _play(_strategy(), {_OFF: 2.0, _SHORT: 1.0, _LONG: 0.5}, 3)
  assert chosen == [_OFF, _SHORT, _LONG]


def test_some_slow_clock_readings_do_not_depose_the_best_arm() -> None:
  strategy = _strategy(epsilon=1e-9)
  _play(strategy, {_OFF: 1.0, _SHORT: 0.9, _LONG: 0.8}, 20)
  for _ in range(4):
    strategy.update(_OFF, 1, 100, 50.0)
  assert strategy.choose(1) == _OFF


def test_one_lucky_try_does_not_make_an_arm_the_best() -> None:
  strategy = _strategy(epsilon=1e-9, window=4)
  for tokens in (50, 50, 130):
    _play(strategy, {_OFF: 1.0, _SHORT: 0.5, _LONG: 0.5}, 10)
    strategy.update(_SHORT, 1, tokens, 1.0)
  assert strategy.choose(1) == _OFF


def test_an_arm_that_a_hiccup_slowed_comes_back() -> None:
  strategy = _strategy(max_rest_secs=50.0)
  strategy.update(_OFF, 1, 100, 1.0)
  strategy.update(_SHORT, 1, 200, 1e6)
  _, chosen = _play(strategy, {_OFF: 1.0, _SHORT: 2.0, _LONG: 0.5}, 300)
  assert _SHORT not in chosen[:50]
  assert np.mean([shape == _SHORT for shape in chosen[-100:]]) > 0.9


def test_accepted_lengths_are_averaged() -> None:
  """Half the stretches of one arm make 9 tokens: 5 a second, median 1."""
  strategy = _strategy(epsilon=1e-9)
  for index in range(20):
    strategy.update(_OFF, 1, 2, 1.0)
    strategy.update(_SHORT, 1, 1, 1.0)
    strategy.update(_LONG, 1, 9 if index % 2 else 1, 1.0)
  assert strategy.choose(1) == _LONG


def test_stretches_with_a_compilation_are_ignored() -> None:
  strategy = _strategy()
  for _ in range(3):
    strategy.update(strategy.choose(1), 1, 5, 100.0, compiled=True)
  assert strategy.choose(1) == _OFF
  assert strategy.to_dict()['buckets'] == _strategy().to_dict()['buckets']


def test_rows_that_ended_do_not_count() -> None:
  """Half the rows end at once; the others make 3 tokens a round."""
  full, halved = _strategy(), _strategy()
  for shape in (_OFF, _SHORT, _LONG):
    full.update(shape, 4, 4 * 8 * 3, 1.0, num_rounds=8)
    halved.update(shape, 4, 2 * 8 * 3, 1.0, num_rounds=8, num_passes=16)
  assert full.to_dict() == halved.to_dict()


def test_short_and_long_stretches_compare() -> None:
  strategy = _strategy(epsilon=1e-9)
  for num_rounds in (16, 1, 1):
    strategy.update(_OFF, 1, 2 * num_rounds, 0.1 * num_rounds)
  for shape in (_SHORT, _LONG):
    strategy.update(shape, 1, 16, 1.6, num_rounds=16)
  assert strategy.choose(1) == _OFF


@pytest.mark.parametrize(
  ('batch_size', 'num_nodes'),
  [(1, 48), (2, 32), (4, 32), (5, 16), (20, 16), (21, 8), (32, 8), (33, 1)],
)
def test_default_buckets_are_those_of_tlt(
  batch_size: int, num_nodes: int
) -> None:
  strategy = strategy_lib.Strategy(strategy_config.StrategyConfig(name='fixed'))
  assert strategy.choose(batch_size).num_nodes == num_nodes


@pytest.mark.parametrize(
  'config', [strategy_config.StrategyConfig(), strategy_config.CPU]
)
def test_off_is_an_arm_of_every_bucket(
  config: strategy_config.StrategyConfig,
) -> None:
  strategy = strategy_lib.Strategy(config)
  for batch_size in (1, 3, 8, 24, 100):
    assert _OFF in strategy.arms(batch_size)
    assert set(strategy.arms(batch_size)) <= set(strategy.arms())


@pytest.mark.parametrize('name', _BANDITS)
def test_without_a_model_only_off_and_copies_are_chosen(name: Any) -> None:
  config = strategy_config.StrategyConfig(name, ('2_1_3+4_1_5c',), (1,))
  strategy = strategy_lib.Strategy(config)
  copied = tree.DraftShape(4, 1, 5, copied=True)
  speeds = {_OFF: 1.0, _SHORT: 9.0, copied: 2.0}
  _play(strategy, speeds, 20)
  saved = strategy.to_dict()
  strategy.leave_out_model()
  _, chosen = _play(strategy, speeds, 50)
  assert set(chosen) <= {_OFF, copied}
  # What the model would have made does not count against the copies.
  assert chosen.count(copied) > 40
  # A run that goes on has its memory, and leaves the model out again.
  other = strategy_lib.Strategy.from_dict(config, saved)
  other.leave_out_model()
  assert other.choose(1) == copied


def test_a_table_without_its_model_is_off() -> None:
  config = strategy_config.StrategyConfig('fixed', ('2_1_3', '4_1_5c'), (1, 2))
  strategy = strategy_lib.Strategy(config)
  strategy.leave_out_model()
  assert strategy.choose(1) == _OFF
  strategy.update(_OFF, 1, 1, 1.0)
  assert strategy.choose(2).copied


def test_buckets_learn_apart() -> None:
  config = strategy_config.StrategyConfig(
    arms=('2_1_3', '2_1_3'), thresholds=(1, 4), epsilon=1e-9
  )
  strategy = strategy_lib.Strategy(config)
  for batch_size, tokens in ((1, 5), (4, 1)):
    strategy.update(_OFF, batch_size, 2 * batch_size, 1.0)
    strategy.update(_SHORT, batch_size, tokens * batch_size, 1.0)
  assert [strategy.choose(n) for n in (3, 4)] == [_SHORT, _OFF]


@pytest.mark.parametrize('name', [*_BANDITS, 'fixed'])
def test_a_saved_strategy_goes_on_as_if_never_stopped(name: Any) -> None:
  arms = ('2_1_3',) if name == 'fixed' else _TWO_ARMS.arms
  config = strategy_config.StrategyConfig(name, arms, (1,))
  speeds = {_OFF: 1.0, _SHORT: 1.5, _LONG: 1.4}
  strategy = strategy_lib.Strategy(config, np.random.default_rng(7))
  _play(strategy, speeds, 100)
  saved = json.loads(json.dumps(strategy.to_dict(), allow_nan=False))
  restored = strategy_lib.Strategy.from_dict(config, saved)
  assert _play(restored, speeds, 300) == _play(strategy, speeds, 300)
  assert restored.to_dict() == strategy.to_dict()


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda saved: saved.pop('rng'), "KeyError: 'rng'"),
    (lambda saved: saved.update(rng={'bit_generator': 'x'}), 'start without'),
    (lambda saved: saved.update(thresholds=[1, 2]), r'thresholds \(1, 2\)'),
    (lambda saved: saved.update(name='ucb'), "it is 'ucb'"),
    (lambda saved: saved.update(buckets=[]), 'start without it'),
    (lambda saved: saved['buckets'][0].pop('arms'), "KeyError: 'arms'"),
    (lambda saved: saved['buckets'][0]['arms'].pop('2_1_3'), 'arms must be'),
    (
      lambda saved: saved['buckets'][0].update(num_stretches=float('nan')),
      'every number must be 0 or more, one is nan',
    ),
    (
      lambda saved: saved['buckets'][0]['arms']['2_1_3'].update(rewards=[[1]]),
      'TypeError',
    ),
  ],
)
def test_a_damaged_saved_strategy_is_refused_in_one_line(
  damage: Callable[[Any], Any], message: str
) -> None:
  saved = json.loads(json.dumps(_strategy().to_dict()))
  damage(saved)
  with pytest.raises(ValueError, match=message) as error:
    strategy_lib.Strategy.from_dict(_TWO_ARMS, saved)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'name': 'best'}, "strategy.name='best' must be one of beg_mab, ucb, fix"),
    ({'arms': ('2_1_3',)}, 'must have one entry for each of'),
    ({'arms': (), 'thresholds': ()}, 'must have one entry for each of'),
    ({'arms': ('2_1_3', '2_1_3'), 'thresholds': (2, 3)}, 'ascend from 1'),
    ({'arms': ('2_1_3', '2_1_3'), 'thresholds': (1, 1)}, 'ascend from 1'),
    ({'arms': ('2_1',), 'thresholds': (1,)}, "'2_1' must be depth_topk_nodes"),
    ({'arms': ('2_1_2',), 'thresholds': (1,)}, 'draft.num_nodes=2 must exceed'),
    (
      {'name': 'fixed', 'arms': ('2_1_3+4_1_5',), 'thresholds': (1,)},
      'must be one shape',
    ),
    ({'window': 0}, 'strategy.window=0 must be at least 1'),
    ({'epsilon': 0.0}, r'strategy.epsilon=0.0 must be in \(0, 1\)'),
    ({'exploration': 1.0}, r'strategy.exploration=1.0 must be in \(0, 1\)'),
    ({'max_rest_secs': float('inf')}, 'max_rest_secs=inf must be 0 or more'),
  ],
)
def test_bad_settings_are_refused_in_one_line(
  fields: dict[str, Any], message: str
) -> None:
  with pytest.raises(ValueError, match=message) as error:
    strategy_config.StrategyConfig(**fields).validate()
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((tree.DraftShape(9, 1, 10), 1, 5, 1.0), 'Shape 9_1_10 is no arm'),
    ((_OFF, 1, 5, 0.0), 'secs=0.0'),
    ((_OFF, 1, 5, float('nan')), 'secs=nan'),
    ((_OFF, 1, -5, 1.0), 'accepted_tokens=-5 must be 0 or more'),
    ((_OFF, -1, 5, 1.0), 'batch_size=-1 must be at least 1'),
  ],
)
def test_impossible_stretches_are_refused(arguments: Any, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    _strategy().update(*arguments)
