"""The page of curves has every arm."""

from benchmarks import tlt_table
from efficient_llm.training import page


def test_every_arm_has_its_curves() -> None:
  arm = {
    'reward_final': 0.5,
    'acceptance_last': 2.0,
    'step_secs': 7.0,
    'reward_by_step': [0.25, 0.5],
    'acceptance_by_step': [1.5, 2.0],
    'rollout_secs_by_step': [1.0, 2.0],
    'update_secs_by_step': [0.5, 1.0],
    'step_secs_by_step': [3.0, 4.0],
  }
  text = page.render('TLT', tlt_table.curves({'plain': arm, 'frozen': arm}))
  assert 'Time of a step, plain' in text
  # Stacked: an update of 1 s stands on a rollout of 2 s.
  assert 'and the rest from 3 to 4; and update from 1.5 to 3' in text
  assert 'frozen from 1.5 to 2' in text
  assert 'plain from 1.5 to 2' not in text
