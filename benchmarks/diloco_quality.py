"""What islands that hardly talk lose, at equal tokens, on real text.

    ./run.sh python -m benchmarks.diloco_quality [--quick] [--only=NAME,...]

A byte-level model is trained on eight parts of the Python standard library,
then goes on from that checkpoint in every arm over the same number of tokens:
one worker with a quarter of them, data-parallel training (four times the
batch), four times the updates, and islands with each variant. An interrupted
benchmark goes on where it was. Inner rates (two to four of 1.5e-3 to 2e-2 for
workers, islands and data-parallel training, each with either optimiser) and
outer constants were chosen on another start and another order of the text
(`--seed=1`), so that no arm is tuned on what it shows.

Over 300 lines: the arms, which are the table, beside what runs them.

For each arm:
  val_loss                    nats a byte on held-out text of the same parts
  ood_loss                    on English documentation, never trained on
  bytes_per_island            sent by an island over the run
  reduction_vs_data_parallel  how many times fewer than a float32 gradient each
                              step
At the top level, with AdamW inside where not said otherwise:
  gap_closed                  share of the gap from one worker to data-parallel
                              training that the best islands of `sync_period`
                              close, each optimiser against its own
  int4_ratio                  loss with int4 to that without
  streaming_int4_ratio        streaming and int4 to plain islands, same period
  ood_ratio                   plain islands to data-parallel, other text
  streaming_int4_reduction    bytes
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from benchmarks import harness
from efficient_llm import optimizer
from efficient_llm.data import pipeline
from efficient_llm.diloco import train, variants
from efficient_llm.diloco.compression import CompressionConfig
from efficient_llm.diloco.config import DilocoConfig, MembershipConfig
from efficient_llm.diloco.fragments import FragmentConfig
from efficient_llm.diloco.outer import OuterConfig
from efficient_llm.models import presets, transformer
from efficient_llm.training import (
  chart,
  checkpoint,
  evaluation,
  loop,
  objectives,
  pretrain,
  saved_run,
  sections,
  step,
)

# Parts of the standard library that are in every supported version, as eight
# domains; and text of another kind.
_PARTS = (
  '*.py',
  'asyncio',
  'email',
  'encodings',
  'importlib',
  'multiprocessing',
  'tkinter',
  'unittest',
)
_OTHER = 'pydoc_data'

_ISLANDS = 4
# Rows of all islands together, and tokens of each.
_ROWS, _LENGTH = 16, 128
_SHORT_PERIOD, _LONG_PERIOD = 10, 60
_EVAL_BATCHES = 64


@dataclasses.dataclass(frozen=True)
class Arm:
  """A row of the table.

  Attributes:
    change: Makes its configuration of that of plain islands.
    tokens: Share of the tokens of the others.
    is_parallel: Whether a gradient is sent each step instead of updates.
  """

  change: Callable[[DilocoConfig], DilocoConfig]
  tokens: float = 1.0
  is_parallel: bool = False


def _with(**changes: Any) -> Callable[[DilocoConfig], DilocoConfig]:
  return lambda config: dataclasses.replace(config, **changes)


def _alone(
  config: DilocoConfig, *, rows: int, steps: float = 1.0
) -> DilocoConfig:
  """One worker without any island."""
  return dataclasses.replace(
    config,
    islands=1,
    outer=OuterConfig('sgd', 1.0),
    data=dataclasses.replace(config.data, batch_size=rows),
    loop=dataclasses.replace(
      config.loop, num_steps=round(steps * config.loop.num_steps)
    ),
  )


def _inner(**changes: Any) -> Callable[[DilocoConfig], DilocoConfig]:
  """Other settings of the inner optimiser."""
  return lambda config: dataclasses.replace(
    config, optimizer=dataclasses.replace(config.optimizer, **changes)
  )


def _several(count: int) -> Callable[[DilocoConfig], DilocoConfig]:
  """Another number of islands that share the rows."""

  def change(config: DilocoConfig) -> DilocoConfig:
    return dataclasses.replace(
      config,
      islands=count,
      data=dataclasses.replace(config.data, batch_size=_ROWS // count),
    )

  return change


def _chain(
  *changes: Callable[[DilocoConfig], DilocoConfig],
) -> Callable[[DilocoConfig], DilocoConfig]:
  return lambda config: functools.reduce(lambda c, f: f(c), changes, config)


def _variant(name: str) -> Callable[[DilocoConfig], DilocoConfig]:
  return functools.partial(variants.apply, name)


def _by_domain(config: DilocoConfig) -> DilocoConfig:
  data = dataclasses.replace(config.data, island_sharding='sources')
  return dataclasses.replace(config, data=data)


_ONE = functools.partial(_alone, rows=_ROWS // _ISLANDS)
_PARALLEL = functools.partial(_alone, rows=_ROWS)
_MORE = functools.partial(_alone, rows=_ROWS // _ISLANDS, steps=_ISLANDS)
_MUON = _inner(name='muon', learning_rate=12e-3)
_LONG = _with(sync_period=_LONG_PERIOD)
_INT4 = _with(compression=CompressionConfig('int4', block_size=256))
_STREAMING = _with(fragments=FragmentConfig(2, overlap_steps=2, mixing=0.5))

ARMS: dict[str, Arm] = {
  'one_island': Arm(
    _chain(_inner(learning_rate=3e-3), _ONE), tokens=1 / _ISLANDS
  ),
  'data_parallel': Arm(_PARALLEL, is_parallel=True),
  'more_updates': Arm(_MORE),
  'diloco': Arm(_with()),
  'diloco_published': Arm(_with(outer=OuterConfig())),
  'local_sgd': Arm(_variant('local_sgd')),
  'int4': Arm(_INT4),
  # A round of delay leaves less room for momentum.
  'eager': Arm(_with(method='eager', outer=OuterConfig('nesterov', 0.7, 0.0))),
  'delayed': Arm(
    _with(method='delayed', outer=OuterConfig('delayed_nesterov', 0.7, 0.0))
  ),
  'noloco': Arm(_variant('noloco')),
  'drop_30': Arm(_with(membership=MembershipConfig(drop_probability=0.3))),
  'drop_50': Arm(_with(membership=MembershipConfig(drop_probability=0.5))),
  'by_domain': Arm(_by_domain),
  'islands_2': Arm(_several(2)),
  'islands_8': Arm(_several(8)),
  'islands_8_by_domain': Arm(_chain(_several(8), _by_domain)),
  'muon_one_island': Arm(
    _chain(_inner(name='muon', learning_rate=3e-3), _ONE),
    tokens=1 / _ISLANDS,
  ),
  'muon_data_parallel': Arm(_chain(_MUON, _PARALLEL), is_parallel=True),
  'muon_diloco': Arm(
    _chain(_MUON, _with(outer=OuterConfig(learning_rate=0.7, momentum=0.3)))
  ),
  'long': Arm(_LONG),
  'long_int4': Arm(_chain(_LONG, _INT4)),
  'long_streaming_int4': Arm(_chain(_LONG, _STREAMING, _INT4)),
  # 1 of 32 values in four bits, with its place: 2,000 times fewer bytes.
  'sparse': Arm(_chain(_variant('sparseloco'), _with(sync_period=75))),
}
_QUICK = ('one_island', 'data_parallel', 'diloco', 'long_streaming_int4')


def _data(seed: int) -> pipeline.DataConfig:
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  return pipeline.DataConfig(
    sources=tuple(str(root / part) for part in _PARTS),
    sequence_length=_LENGTH,
    batch_size=_ROWS,
    seed=seed,
  )


def _loop(num_steps: int) -> loop.LoopConfig:
  return loop.LoopConfig(
    num_steps=num_steps,
    log_every=20,
    eval_every=None,
    eval_batches=1,
    tensorboard=False,
    checkpoint=checkpoint.CheckpointConfig(every_steps=200, max_to_keep=1),
  )


class Benchmark:
  """The start that all arms share, and what judges them.

  Args:
    folder: Where runs are kept.
    seed: Of parameters and order.
    num_steps: Of an arm with all rows.
    num_start_steps: Of the start.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    *,
    seed: int,
    num_steps: int,
    num_start_steps: int,
  ):
    self._folder = folder / f'{num_start_steps}-{num_steps}-{seed}'
    model = presets.get('ladder_200k')
    self._base = DilocoConfig(
      model=model,
      data=dataclasses.replace(_data(seed), batch_size=_ROWS // _ISLANDS),
      optimizer=_optimizer(),
      loop=_loop(num_steps),
      start=str(self._folder / 'start'),
      seed=seed,
      islands=_ISLANDS,
      sync_period=_SHORT_PERIOD,
      # Few rounds: 0.9 has no time to settle.
      outer=OuterConfig(learning_rate=0.7, momentum=0.5),
    )
    pretrain.train(
      pretrain.PretrainConfig(
        model=model,
        data=_data(seed),
        optimizer=_optimizer(),
        loop=_loop(num_start_steps),
        seed=seed,
      ),
      workdir=self._folder / 'start',
    )
    cache_dir = self._folder / 'start' / 'cache'
    other = dataclasses.replace(
      _data(seed),
      sources=(),
      path=str(pathlib.Path(sysconfig.get_path('stdlib')) / _OTHER),
      # All of it: nothing is trained on.
      validation_path=str(pathlib.Path(sysconfig.get_path('stdlib')) / _OTHER),
    )
    self._texts = {
      'val_loss': _validation(_data(seed), cache_dir),
      'ood_loss': _validation(other, cache_dir),
    }
    loss = objectives.language_model_loss(model)
    self._eval_step: step.EvalStep = jax.jit(
      lambda params, batch: loss(params, batch, jax.random.key(0))
    )
    self._num_params = transformer.num_params(model)

  def losses(self, params: Any) -> dict[str, float]:
    """Loss on both held-out texts, with the same batches for all arms."""
    return {
      name: evaluation.evaluate(
        text,
        params,
        eval_step=self._eval_step,
        place=lambda batch: batch,
        num_batches=_EVAL_BATCHES,
      )['loss']
      for name, text in self._texts.items()
    }

  def start_losses(self) -> dict[str, float]:
    """Those of the checkpoint."""
    folder = self._folder / 'start' / 'checkpoints'
    return self.losses(saved_run.restore_params(folder, None))

  def run(self, name: str, arm: Arm) -> dict[str, Any]:
    """Trains an arm, or takes what it left; gives its row.

    Args:
      name: Of the arm, and its folder.
      arm: What it is.
    """
    workdir = self._folder / name
    done = workdir / 'row.json'
    if done.is_file():
      return json.loads(done.read_text(encoding='utf-8'))
    config = arm.change(self._base)
    start = time.perf_counter()
    outcome = train.train(config, workdir=workdir)
    if outcome.stopped_by is not None:
      sys.exit(f'Stopped by {outcome.stopped_by}; the same command continues.')
    result = json.loads((workdir / 'result.json').read_text(encoding='utf-8'))
    gradients = 4 * self._num_params * self._base.loop.num_steps
    sent = gradients if arm.is_parallel else result['sent_bytes_per_island']
    if config.islands == 1 and not arm.is_parallel:
      sent = 0
    row = {
      'arm': name,
      'islands': config.islands,
      'sync_period': config.sync_period if config.islands > 1 else None,
      'num_steps': config.loop.num_steps,
      'tokens': arm.tokens,
      **self.losses(outcome.state.params),
      'bytes_per_island': sent,
      'reduction_vs_data_parallel': gradients / sent if sent else None,
      'secs': time.perf_counter() - start,
    }
    done.write_text(json.dumps(row), encoding='utf-8')
    return row


def _optimizer() -> optimizer.OptimizerConfig:
  return optimizer.OptimizerConfig(
    learning_rate=6e-3, b2=0.99, warmup_steps=20, schedule='wsd'
  )


def _validation(
  config: pipeline.DataConfig, cache_dir: pathlib.Path
) -> pipeline.Dataset:
  return pipeline.open_dataset(config, split='validation', cache_dir=cache_dir)


def summary(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The figures at the top level; None where an arm is missing."""

  def ratio(one: str, other: str, key: str = 'val_loss') -> float | None:
    if one not in rows or other not in rows:
      return None
    return rows[one][key] / rows[other][key]

  def closed(prefix: str) -> float | None:
    names = [f'{prefix}{x}' for x in ('one_island', 'diloco', 'data_parallel')]
    if not set(names) <= set(rows):
      return None
    worst, found, best = (rows[name]['val_loss'] for name in names)
    return (worst - found) / (worst - best)

  prefixes = {'adamw': '', 'muon': 'muon_'}
  gaps = {name: closed(prefix) for name, prefix in prefixes.items()}
  other_text = {
    name: ratio(f'{prefix}diloco', f'{prefix}data_parallel', 'ood_loss')
    for name, prefix in prefixes.items()
  }
  known = [gap for gap in gaps.values() if gap is not None]
  streamed = rows.get('long_streaming_int4', {})
  return {
    'gap_closed': max(known) if known else None,
    'gap_closed_by_optimizer': gaps,
    'int4_ratio': ratio('int4', 'diloco'),
    'streaming_int4_ratio': ratio('long_streaming_int4', 'long'),
    'ood_ratio': other_text['adamw'],
    'ood_ratio_by_optimizer': other_text,
    'streaming_int4_reduction': streamed.get('reduction_vs_data_parallel'),
    'sparse_ratio': ratio('sparse', 'data_parallel'),
  }


@dataclasses.dataclass(frozen=True)
class _LossByBytes:
  """Every arm that sends something as a point with its name."""

  rows: Sequence[Mapping[str, Any]]

  def render(self) -> str:
    """Returns the section as an HTML fragment."""
    sent = [row for row in self.rows if row['bytes_per_island']]
    places = [(row['bytes_per_island'] / 1e6, row['val_loss']) for row in sent]

    def paint(axes: Any) -> None:
      for row, place in zip(sent, places, strict=True):
        axes.plot(*place, marker='o', color=chart.SERIES[0])
        axes.annotate(
          row['arm'], place, xytext=(4, 3), textcoords='offset points'
        )
      axes.set_xscale('log')
      axes.set_xlabel('MB sent by an island')
      axes.grid(axis='y')

    alt = '; '.join(
      f'{row["arm"]} {loss:.3f} at {sent:.3g} MB'
      for row, (sent, loss) in zip(sent, places, strict=True)
    )
    body = '<p class="axis">nats a byte</p>' + chart.draw(paint, alt=alt)
    return sections.frame('Loss by bytes sent', body, kind='chart')


def _picture(rows: Sequence[Mapping[str, Any]]) -> list[sections.Section]:
  columns = (
    'arm',
    'val_loss',
    'ood_loss',
    'bytes_per_island',
    'reduction_vs_data_parallel',
  )
  table = sections.Table(
    'Arms',
    ('arm', 'held-out loss', 'other text', 'bytes', 'times fewer'),
    [[row[name] for name in columns] for row in rows],
    note='Losses in nats a byte; bytes that an island sends in the whole run.',
  )
  return [table, _LossByBytes(rows)]


def main() -> None:
  """Trains all arms."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='four short arms')
  parser.add_argument('--only', help='these arms, by name')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument(
    '--cache_dir', type=pathlib.Path, default='out/diloco_quality'
  )
  arguments = parser.parse_args()
  names = arguments.only.split(',') if arguments.only else list(ARMS)
  if unknown := sorted(set(names) - set(ARMS)):
    print(
      f'error: --only names {unknown}, and must name arms of {list(ARMS)}.',
      file=sys.stderr,
    )
    sys.exit(2)
  if arguments.quick:
    names = [name for name in names if name in _QUICK]
  start = time.perf_counter()
  bench = Benchmark(
    arguments.cache_dir,
    seed=arguments.seed,
    num_steps=60 if arguments.quick else arguments.steps,
    num_start_steps=40 if arguments.quick else 400,
  )
  rows = {}
  for number, name in enumerate(names, 1):
    rows[name] = bench.run(name, ARMS[name])
    print(f'{number}/{len(names)}', rows[name], file=sys.stderr, flush=True)
  record = 'diloco_quality_quick' if arguments.quick else 'diloco_quality'
  harness.picture(
    record, 'What islands lose by hardly talking', _picture(list(rows.values()))
  )
  harness.record(
    record,
    {
      **summary(rows),
      'start': bench.start_losses(),
      'seed': arguments.seed,
      'rows': list(rows.values()),
      'secs': time.perf_counter() - start,
    },
  )


if __name__ == '__main__':
  main()
