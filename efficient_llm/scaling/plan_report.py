"""Which small models to train: designs, advice and the page that shows them."""

import dataclasses
import pathlib
from typing import Any

from efficient_llm.scaling import auto, borrow, data, planner
from efficient_llm.scaling.config import ScalingConfig
from efficient_llm.training import report, sections, units

# Between runs that differ in nothing but the seed: the median of the published
# repeats is 0.24 %.
_NOISE = 0.003


def write(
  config: ScalingConfig,
  runs: data.Runs | None,
  target: data.Runs | None,
  *,
  workdir: pathlib.Path,
) -> dict[str, Any]:
  """Plans, and writes result.json and report.html.

  Args:
    config: Budget and target.
    runs: Of the family, where some were made.
    target: What they are to predict; None where the configuration says it.
    workdir: Where to.
  Returns:
    What result.json holds.
  Raises:
    ValueError: If there is no target, or nothing fits the budget.
  """
  noise, constants = config.plan.noise, None
  size, tokens = config.target_params, config.target_tokens
  if runs is not None and target is not None:
    size, tokens = float(target.num_params[0]), float(target.num_tokens[0])
    constants = auto.predict(runs, target).constants
    noise = noise or planner.noise_of(runs)
  if size is None:
    raise ValueError('A plan needs --config.target_params=N; set it.')
  tokens = tokens or 20 * size
  found = planner.designs(
    budget_flops=config.plan.budget_flops,
    target_params=size,
    target_tokens=tokens,
    noise=noise or _NOISE,
    prior=None if config.plan.borrow else borrow.WIDE,
    constants=constants,
  )
  best = found[0]
  cheap = planner.cheapest_within(found, config.plan.accuracy)
  alone = next((one for one in found if not one.partial_target), None)
  partial = next((one for one in found if one.partial_target), None)
  advice = _advice(config, best, cheap, alone, partial)
  result = {
    'target_params': size,
    'target_tokens': tokens,
    'noise': noise or _NOISE,
    'advice': advice,
    'best': dataclasses.asdict(best),
    'cheapest_within': dataclasses.asdict(cheap) if cheap else None,
    'designs': [dataclasses.asdict(one) for one in found[:20]],
    'config': dataclasses.asdict(config),
  }
  report.write_result(workdir, result)
  rows = [
    [
      ', '.join(units.format_count(n) for n in one.num_params),
      ', '.join(units.format_count(d) for d in one.num_tokens),
      'yes' if one.partial_target else 'no',
      f'{one.flops:.2g}',
      one.expected_error,
      one.interval,
    ]
    for one in found[:20]
  ]
  report.write_report(
    workdir,
    title='What to train before the large model',
    subtitle=f'{units.format_count(size)} parameters on '
    f'{units.format_count(tokens)} tokens',
    sections=[
      sections.Text('Advice', '\n\n'.join(advice)),
      sections.Table(
        'Designs',
        (
          'parameters',
          'tokens',
          '30 % of the target',
          'FLOPs',
          'expected error, %',
          '90 % interval, ± %',
        ),
        rows,
        note='Computed from where rows would lie, how noisy runs are, and how '
        'far laws of published families were off as far ahead. There 9 errors '
        'of 10 stayed inside such intervals.',
      ),
      sections.Configuration(dataclasses.asdict(config)),
    ],
  )
  return result


def _advice(config, best, cheap, alone, partial) -> list[str]:
  lines = [f'Best within the budget: {_words(best)}']
  if cheap is None:
    lines.append(
      f'No design within {config.plan.budget_flops:.2g} FLOPs is expected to '
      f'come within {config.plan.accuracy:g} %; spend more, or accept '
      f'{best.expected_error:.1f} %.'
    )
  elif cheap != best:
    lines.append(f'Enough for {config.plan.accuracy:g} %: {_words(cheap)}')
  if partial is not None and alone is not None:
    gain = alone.expected_error - partial.expected_error
    worth = 'is worth it' if gain > 0.2 else 'buys nothing'
    lines.append(
      f'Training 30 % of the target {worth}: {partial.expected_error:.2f} % '
      f'with it, {alone.expected_error:.2f} % without.'
    )
  elif partial is None:
    lines.append('30 % of the target is more than the budget.')
  kept = 'are counted' if config.plan.borrow else 'are not counted'
  lines.append(
    f"Other families' constants {kept}; --config.plan.borrow changes that. "
    'Keep ten or so checkpoints of every run, from a tenth of its tokens on, '
    'evenly in the logarithm.'
  )
  return lines


def _words(design: planner.Design) -> str:
  runs = '; '.join(
    f'{units.format_count(n)} parameters on {units.format_count(d)} tokens'
    for n, d in zip(design.num_params, design.num_tokens, strict=True)
  )
  more = ', and 30 % of the target' if design.partial_target else ''
  return (
    f'{runs}{more}. {design.flops:.2g} FLOPs, expected error '
    f'{design.expected_error:.1f} %.'
  )
