"""What the line found: figures with their baselines, and where it did not pay.

Every figure is read from the result.json and metrics.jsonl of a stage of this
line. Savings are against a baseline that was trained in it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from efficient_llm.end_to_end.stages import Line
from efficient_llm.training import metrics


def make(line: Line, secs: Mapping[str, float]) -> dict[str, Any]:
  """What result.json of the line holds.

  Args:
    line: All of whose stages are done.
    secs: Of every stage.
  """
  predicted = line.result('prediction')['predictions'][0]
  scratch = line.result('scratch')
  growth = line.result('growth')
  islands, control = line.result('islands'), line.result('control')
  reasoning = line.result('reasoning')
  card = growth['growth']
  interval = [predicted['low'], predicted['high']]
  achieved = scratch['eval_loss']
  sent = islands['sent_bytes_per_island']
  gradients = 4 * control['num_params'] * control['num_steps']
  held_out = metrics.read_metrics(line.workdir / 'reasoning', kind='eval')
  result = {
    'predicted_loss': predicted['loss'],
    'interval90': interval,
    'achieved_loss': achieved,
    'is_inside_interval': interval[0] <= achieved <= interval[1],
    'best_loss_seen': min(
      line.result(line.rung(i))['eval_loss']
      for i in range(len(line.config.ladder))
    ),
    'growth_flops_saving': card.get('warm_flops_saving'),
    'growth_flops_saving_cold': card.get('cold_flops_saving'),
    'growth_reached_scratch': card.get('reached_scratch', False),
    'grown_loss': growth['eval_loss'],
    'diloco_byte_reduction': gradients / sent if sent else None,
    'diloco_bytes_per_island': sent,
    'data_parallel_bytes': gradients,
    'diloco_loss_ratio': islands['eval_loss'] / control['eval_loss'],
    'diloco_loss': islands['eval_loss'],
    'data_parallel_loss': control['eval_loss'],
    'rl_speedup': reasoning['speedup_step'],
    'rl_speedup_rollout': reasoning['speedup_rollout'],
    'rl_secs': reasoning['step_secs'],
    'rl_secs_without': reasoning['plain_step_secs'],
    'rl_same_tokens': reasoning['plain_same_tokens'],
    'rl_reward_before': held_out[0]['reward'],
    'rl_reward_after': held_out[-1]['reward'],
    'stages': dict(secs),
    'total_secs': sum(secs.values()),
  }
  return {
    **result,
    'verdicts': verdicts(result),
    'config': dataclasses.asdict(line.config),
  }


def verdicts(result: Mapping[str, Any]) -> dict[str, str]:
  """A sentence on each technique, also where it did not pay.

  Args:
    result: The other figures.
  """
  low, high = result['interval90']
  error = result['predicted_loss'] / result['achieved_loss'] - 1
  inside = 'inside' if result['is_inside_interval'] else 'outside'
  predicted = (
    f'The target reached {result["achieved_loss"]:.3f} nats a token, '
    f'{inside} the 90 % interval {low:.3f} to {high:.3f}; the prediction was '
    f'off by {abs(error):.1%}. The best small model had '
    f'{result["best_loss_seen"]:.3f}.'
  )
  if not result['is_inside_interval']:
    predicted += ' The prediction failed here.'
  return {
    'predict': predicted,
    'grow': _grown(result),
    'distribute': _distributed(result),
    'reason': _reasoned(result),
  }


def _grown(result: Mapping[str, Any]) -> str:
  saving, cold = (
    result['growth_flops_saving'],
    result['growth_flops_saving_cold'],
  )
  if saving is None:
    return (
      'Growing never had a loss that training from nothing had too, so nothing '
      'can be compared.'
    )
  reached = (
    'to the last loss of training from nothing'
    if result['growth_reached_scratch']
    else 'to the lowest loss it reached, which is above the last one of '
    'training from nothing'
  )
  if saving <= 0:
    return f'Growing did not pay: {-saving:.0%} more FLOPs {reached}.'
  text = f'Growing took {saving:.0%} fewer FLOPs {reached}'
  if cold is None:
    return f'{text}.'
  if cold <= 0:
    return (
      f'{text}; counting the small model, which was trained for the '
      f'prediction anyway, {-cold:.0%} more.'
    )
  return f'{text}; {cold:.0%} fewer with the training of the small model.'


def _distributed(result: Mapping[str, Any]) -> str:
  change = result['diloco_loss_ratio'] - 1
  reduction = result['diloco_byte_reduction']
  if reduction is None:
    return 'The islands never talked; lower islands.sync_period.'
  cost = (
    f'a loss {change:.1%} above that of data-parallel training'
    if change > 0
    else f'a loss {-change:.1%} below that of data-parallel training'
  )
  text = (
    f'Islands sent {reduction:,.0f} times fewer bytes, at equal tokens, for '
    f'{cost}.'
  )
  if change > 0.05:
    text += ' That is much; talk more often, or begin later in training.'
  return text


def _reasoned(result: Mapping[str, Any]) -> str:
  before, after = result['rl_reward_before'], result['rl_reward_after']
  speed = result['rl_speedup']
  verb = 'rose' if after > before else 'did not rise'
  text = (
    f'The share of held-out problems solved {verb}: {before:.0%} before, '
    f'{after:.0%} after. '
  )
  if speed <= 1:
    return text + (
      f'Speculation did not pay here: a step took {1 / speed:.2f} times as '
      'long with it.'
    )
  return text + (
    f'With speculation a step was {speed:.2f} times as fast, its rollouts '
    f'{result["rl_speedup_rollout"]:.2f} times; {result["rl_same_tokens"]:.1%} '
    'of the tokens were the same.'
  )
