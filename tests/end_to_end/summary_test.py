"""What the report says of each technique, also where it did not pay."""

from typing import Any

import pytest

from efficient_llm.end_to_end import summary

_PAID: dict[str, Any] = {
  'predicted_loss': 1.70,
  'interval90': [1.65, 1.75],
  'achieved_loss': 1.68,
  'is_inside_interval': True,
  'best_loss_seen': 1.8,
  'growth_flops_saving': 0.6,
  'growth_flops_saving_cold': 0.1,
  'growth_reached_scratch': True,
  'diloco_byte_reduction': 160.0,
  'diloco_loss_ratio': 1.02,
  'rl_speedup': 1.2,
  'rl_speedup_rollout': 1.5,
  'rl_same_tokens': 1.0,
  'rl_reward_before': 0.3,
  'rl_reward_after': 0.6,
}


def _said(**changes: Any) -> str:
  return ' '.join(summary.verdicts(_PAID | changes).values())


def test_what_paid_is_said_with_its_baseline() -> None:
  text = _said()
  assert 'inside the 90 % interval 1.650 to 1.750' in text
  assert '60% fewer FLOPs to the last loss' in text
  assert '10% fewer with the training of the small model' in text
  assert '160 times fewer bytes' in text
  assert '2.0% above' in text
  assert '1.20 times as fast' in text
  assert 'did not' not in text
  assert 'failed' not in text


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'is_inside_interval': False}, 'The prediction failed here'),
    ({'growth_flops_saving': None}, 'nothing can be compared'),
    ({'growth_flops_saving': -0.2}, 'Growing did not pay: 20% more'),
    ({'growth_flops_saving_cold': -0.5}, 'trained for the prediction anyway'),
    ({'growth_reached_scratch': False}, 'the lowest loss it reached'),
    ({'diloco_byte_reduction': None}, 'never talked'),
    ({'diloco_loss_ratio': 1.2}, 'That is much'),
    ({'diloco_loss_ratio': 0.99}, '1.0% below'),
    ({'rl_speedup': 0.5}, 'did not pay here: a step took 2.00 times'),
    ({'rl_reward_after': 0.2}, 'did not rise'),
  ],
)
def test_what_did_not_pay_is_said_too(
  changes: dict[str, Any], message: str
) -> None:
  assert message in _said(**changes)
