"""A plan as aligned lines for people."""

import math
from collections.abc import Iterator, Mapping, Sequence

from efficient_llm.end_to_end import costs
from efficient_llm.training import planner, units

Row = Sequence[str]


def render(plan: planner.Plan) -> str:
  """Writes all of a plan, the verdict last."""
  shape = ', '.join(f'{name} {size}' for name, size in plan.mesh.items())
  lines = [
    f'{plan.topology}: {plan.num_devices} x {plan.device_kind} ({shape}), '
    f'{plan.attention} attention',
  ]
  for title, rows in (
    ('Parameters', _params(plan)),
    ('Memory of one device', _memory(plan)),
    ('A step', _step(plan)),
    ('Sent by each device per step', _collectives(plan)),
    ('Time (an estimate)', _time(plan)),
  ):
    lines += ['', title, *_aligned(list(rows))]
  lines += ['', 'Assumptions', *(f'  {text}' for text in plan.assumptions)]
  return '\n'.join([*lines, '', verdict(plan)])


def render_stages(stages: Mapping[str, planner.Plan]) -> str:
  """Writes a line for each stage of the main job, the verdict last."""
  rows: list[Row] = [
    ('', 'parameters', 'steps', 'tokens', 'peak memory', 'step', 'all steps')
  ]
  total = 0.0
  for name, plan in stages.items():
    estimate = plan.estimate
    secs = math.nan if estimate is None else estimate.total_secs
    total += secs
    rows.append(
      (
        name,
        units.format_count(plan.num_params),
        f'{plan.num_steps:,}',
        units.format_count(plan.tokens_per_step * plan.num_steps),
        _bytes(plan.memory.peak),
        _duration(secs / plan.num_steps),
        _duration(secs),
      )
    )
  rows.append(('in all', *[''] * 5, _duration(total)))
  plans = list(stages.values())
  name, first = next(
    (pair for pair in stages.items() if not pair[1].fits), ('All', plans[0])
  )
  assumptions = dict.fromkeys(
    text for plan in plans for text in plan.assumptions
  )
  return '\n'.join(
    [
      f'{first.topology}: {first.num_devices} x {first.device_kind}',
      f'Memory of one device: {_bytes(first.memory.limit)}. '
      'Times are estimates.',
      '',
      *_aligned(rows),
      '',
      'Assumptions',
      *(f'  {text}' for text in (*assumptions, *costs.ASSUMPTIONS)),
      '',
      f'{name}: {verdict(first)}',
    ]
  )


def verdict(plan: planner.Plan) -> str:
  """Whether it fits and, if not, what to do, in one line."""
  if plan.fits is None:
    return 'Whether it fits is not known: the memory of this device is not.'
  if plan.fits:
    return 'FITS'
  remedy = plan.remedy
  if remedy is None:
    return 'DOES NOT FIT'
  if not remedy.flags:
    return f'DOES NOT FIT; {remedy.reason}'
  flags = ' '.join(remedy.flags)
  return f'DOES NOT FIT; first knob to turn: {flags} ({remedy.reason})'


def _params(plan: planner.Plan) -> Iterator[Row]:
  yield 'total', f'{plan.num_params:,}'
  for name, count in plan.params.items():
    yield name, f'{count:,}', f'{count / plan.num_params:.1%}'
  yield 'checkpoint', units.format_bytes(plan.checkpoint_bytes)


def _memory(plan: planner.Plan) -> Iterator[Row]:
  memory = plan.memory
  yield 'state and batch', _bytes(memory.arguments)
  yield 'temporaries', _bytes(memory.temporaries)
  yield 'results', _bytes(memory.results)
  yield 'program', _bytes(memory.code)
  yield 'peak', _bytes(memory.peak)
  yield 'limit', _bytes(memory.limit)


def _step(plan: planner.Plan) -> Iterator[Row]:
  steps = plan.num_steps
  yield '', 'per step', f'{steps:,} steps'
  yield (
    plan.unit,
    units.format_count(plan.tokens_per_step),
    units.format_count(plan.tokens_per_step * steps),
  )
  yield (
    'model FLOPs',
    f'{plan.flops_per_step:.3g}',
    f'{plan.flops_per_step * steps:.3g}',
  )
  traffic = plan.memory_traffic_bytes_per_device
  if traffic is not None:
    yield 'memory traffic of a device', units.format_bytes(traffic)


def _collectives(plan: planner.Plan) -> Iterator[Row]:
  if not plan.collectives:
    compiled = plan.memory_traffic_bytes_per_device is not None
    yield ('nothing' if compiled else 'unknown: it did not compile',)
    return
  yield 'kind', 'mesh axes', 'bytes', 'count', ''
  for moved in plan.collectives:
    remarks = [
      word
      for word, holds in (
        ('overlapped', moved.overlapped),
        ('across slices or hosts', moved.crosses_network),
      )
      if holds
    ]
    yield (
      moved.kind,
      ' x '.join(moved.mesh_axes),
      units.format_bytes(moved.bytes_per_device_per_step),
      f'{moved.count:,}',
      ', '.join(remarks),
    )


def _time(plan: planner.Plan) -> Iterator[Row]:
  estimate = plan.estimate
  if estimate is None:
    yield ('unknown',)
    return
  yield 'compute', units.format_duration(estimate.compute_secs)
  if estimate.memory_secs is not None:
    yield 'memory', units.format_duration(estimate.memory_secs)
  yield (
    'collectives',
    units.format_duration(estimate.collective_secs),
    f'{units.format_duration(estimate.exposed_collective_secs)} exposed',
  )
  yield 'step', units.format_duration(estimate.step_secs)
  yield f'{plan.unit}/s', units.format_count(estimate.tokens_per_sec)
  yield 'MFU', f'{estimate.mfu:.1%}'
  yield 'whole run', units.format_duration(estimate.total_secs)


def _duration(secs: float) -> str:
  return 'unknown' if math.isnan(secs) else units.format_duration(secs)


def _bytes(number: int | None) -> str:
  return 'unknown' if number is None else units.format_bytes(number)


def _aligned(rows: list[Row]) -> list[str]:
  """Rows as lines of equal columns."""
  num_columns = max(map(len, rows))
  widths = [
    max(len(row[column]) for row in rows if column < len(row))
    for column in range(num_columns)
  ]
  return [
    ('  ' + '  '.join(map(str.ljust, row, widths))).rstrip() for row in rows
  ]
