"""Savings from curves that are known."""

from typing import Any

import pytest

from benchmarks import growth_table
from efficient_llm.training import page


def _curve(name: str, seed: int, losses: list[float], **more: Any) -> dict:
  steps = [20 * i for i in range(len(losses))]
  return {
    'name': name,
    'seed': seed,
    'steps': steps,
    'losses': losses,
    'secs': [0.5 * step for step in steps],
    'probe_loss': losses[1],
    'probe_steps': 10,
    'probe_secs': 5.0,
    **more,
  }


def _arm(
  name: str, seed: int, losses: list[float], *, operator: float = 0.0
) -> dict:
  return _curve(
    name,
    seed,
    losses,
    pair='depth',
    operator_steps=operator,
    operator_secs=operator,
    function_error=1e-7 if name == 'keeps' else 0.5,
    claimed=name == 'keeps',
  )


def _records() -> list[dict]:
  records = []
  for seed in (0, 1):
    records += [
      _curve('scratch', seed, [5.0, 4.0, 3.0, 2.0, 1.0]),
      _curve('small', seed, [5.0, 2.0], pair='depth', cost_steps=16.0),
      # At scratch's last loss after 20 of 80 steps.
      _arm('keeps', seed, [2.0, 1.0]),
      # Comes to 2, for which scratch took 60 steps.
      _arm('slow', seed, [4.0, 3.0, 2.0], operator=5.0),
    ]
  return [*records, _curve('scratch_restarted', 0, [5.0, 3.0])]


def test_savings_are_those_of_the_curves() -> None:
  found = growth_table.summary(
    _records(), candidates={'depth': ('slow', 'keeps')}
  )
  rows = found['pairs']['depth']
  assert rows['keeps']['warm_flops_saving'] == pytest.approx(0.75)
  assert rows['keeps']['cold_flops_saving'] == pytest.approx(0.55)
  assert rows['keeps']['ci95'] == pytest.approx([0.75, 0.75])
  assert rows['keeps']['reached'] == 1
  # 40 steps and 5 of the operator, of 60.
  assert rows['slow']['warm_flops_saving'] == pytest.approx(0.25)
  assert rows['slow']['warm_seconds_saving'] == pytest.approx(1 - 25 / 30)
  assert rows['slow']['reached'] == 0
  # The best trial goes on, the other's 10 steps and operator are its cost.
  assert rows['auto']['chosen'] == ['keeps', 'keeps']
  assert rows['auto']['warm_flops_saving'] == pytest.approx(1 - 35 / 80)
  assert found['auto_regret_points'] == pytest.approx(18.75)
  assert found['best_warm_flops_saving']['depth']['method'] == 'keeps'
  assert found['max_preservation_error'] == 1e-7
  assert found['controls'] == {'scratch_restarted': {'seed': 0, 'loss': 3.0}}


def test_one_seed_has_no_interval_and_a_page_is_drawn() -> None:
  records = [x for x in _records() if x['seed'] == 0]
  found = growth_table.summary(records, candidates={})
  assert found['pairs']['depth']['slow']['ci95'] is None
  assert found['auto_regret_points'] is None
  shown = page.render('Growing', growth_table.pictures(records, found))
  assert 'Grown in depth' in shown
  assert 'steps of the large model' in shown
