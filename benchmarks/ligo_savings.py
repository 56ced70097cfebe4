"""What growing a trained model saves against training from nothing, on text.

    ./run.sh python -m benchmarks.ligo_savings [--quick] [--ablations]

Over 300 lines: what the figures mean, beside what runs the table.

Byte-level models on the Python standard library; 4 layers of width 64 grow out
of half the layers, of half the width, of half of both, and of one layer. Every
seed has its own small models and its own scratch run. Two workers of one core
each; what is done is kept under --cache_dir, and an interrupted benchmark goes
on there.

All runs, those of small models too, have the same rate and warm-up, and are
judged by, and grown from, an average of their parameters, so none has a decay
that another lacks. Large ones read the text in the same order. The rate was
chosen for scratch (`scratch_rates`: half of it and twice as much), and a
scratch run whose moments and warm-up begin anew half-way is a further control
(`scratch_restarted`).

For each pair and method, means over seeds with 95 % intervals:
  warm_flops_saving    1 - FLOPs, operator included, by scratch's FLOPs, to
                       scratch's last loss; where that is not reached within
                       --arm_steps, to the loss that is
  warm_seconds_saving  the same of seconds, without compilation
  cold_flops_saving    with the small model's training
  reached              share of seeds that came to scratch's last loss
  preservation_error   largest difference of logits right after growth, as a
                       share of the largest; with the epsilon of norms that
                       `methods.loss_of_function` asks for
At the top level:
  ligo_depth_warm_flops_saving, ligo_depth_warm_seconds_saving
                           of `ligo`, learned cheaply from the best plain start
  best_warm_flops_saving   by pair, of methods that reached it in every seed,
                           if there are any
  auto_regret_points       largest over pairs: percent points that `auto` saves
                           less than the best fixed method, chosen in hindsight;
                           its candidates were named by what earlier runs of
                           these pairs showed
  max_preservation_error   of methods that claim to keep the function

MSLT and bert2BERT train the large model in another way for a while first (new
layers alone, sub-models drawn by chance), which counts as an operator does, and
so do the forward passes of the teacher that `inherit` has.

--ablations runs other arms: what of learning an operator helps.

`auto` is what method='auto' does with probe.num_steps=10, but for choosing by
held-out text of its own: the best trial goes on, the others' steps are its
cost.
Methods that are the same on a pair ('top' and 'overlap' double a model as
'stack' does) stand there once; 'stack' starts new width at zero.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import growth_arms, growth_lab, growth_table, harness
from efficient_llm.ligo import auto, depth, inheritance, methods
from efficient_llm.ligo.config import LearnConfig
from efficient_llm.models.config import TransformerConfig
from efficient_llm.training import strict_json

# Added to a run's, for the text of a stage.
_STAGE_SEED = 500


class Benchmark:
  """Every run of the table, each kept in a file as soon as it is done."""

  def __init__(self, arguments: argparse.Namespace):
    self._arguments = arguments
    self._folder = arguments.cache_dir / _fingerprint(arguments)
    self._folder.mkdir(parents=True, exist_ok=True)
    texts = growth_lab.Texts(arguments.cache_dir / 'text')
    self._labs: queue.Queue[growth_lab.Lab] = queue.Queue()
    # Most of a quick run is compilation, which each device has for itself.
    self._devices = jax.devices()[: 1 if arguments.quick else 2]
    for device in self._devices:
      self._labs.put(growth_lab.Lab(device, texts))
    self._lock = threading.Lock()

  def run(
    self, arms: dict[str, dict[str, growth_arms.Arm]]
  ) -> list[dict[str, Any]]:
    """All records, in no order that matters."""
    steps, seeds = self._arguments.steps, range(self._arguments.seeds)
    first: dict[str, Callable[[growth_lab.Lab], dict[str, Any]]] = {}
    for seed in seeds:
      first[f'{seed}-scratch'] = self._scratch(seed)
      for pair in arms:
        first[f'{seed}-small-{pair}'] = self._small(pair, seed)
    if not self._arguments.quick:
      first['0-scratch_restarted'] = self._scratch(0, restart_at=steps // 2)
      for rate in (growth_arms.RATE / 2, 2 * growth_arms.RATE):
        first[f'0-scratch_rate_{rate:g}'] = self._scratch(0, rate=rate)
    found = self._all(first)
    targets = {
      x['seed']: x['losses'][-1] for x in found if x['name'] == 'scratch'
    }
    return found + self._all(
      {
        f'{seed}-{pair}-{name}': self._arm(pair, name, arm, seed, targets[seed])
        for pair, of_pair in arms.items()
        for name, arm in of_pair.items()
        for seed in seeds
      }
    )

  def _all(
    self, tasks: dict[str, Callable[[growth_lab.Lab], dict[str, Any]]]
  ) -> list[dict[str, Any]]:
    start, done = time.perf_counter(), [0]

    def work(name: str) -> dict[str, Any]:
      path = self._folder / f'{name}.json'
      if path.is_file():
        return json.loads(path.read_text(encoding='utf-8'))
      lab = self._labs.get()
      begun = time.perf_counter()
      try:
        record = tasks[name](lab)
      finally:
        self._labs.put(lab)
      record['worker_secs'] = time.perf_counter() - begun
      strict_json.write_atomically(path, strict_json.to_json(record))
      with self._lock:
        done[0] += 1
        now = time.perf_counter()
        print(
          f'{done[0]}/{len(tasks)} {name}: loss {record["losses"][0]:.3f} -> '
          f'{record["losses"][-1]:.3f} in {record["steps"][-1]} steps, '
          f'{now - begun:.0f} s, {now - start:.0f} s in all',
          file=sys.stderr,
        )
      return record

    with concurrent.futures.ThreadPoolExecutor(len(self._devices)) as pool:
      return list(pool.map(work, tasks))

  def _scratch(
    self,
    seed: int,
    *,
    rate: float = growth_arms.RATE,
    restart_at: int | None = None,
  ) -> Callable[[growth_lab.Lab], dict[str, Any]]:
    def task(lab: growth_lab.Lab) -> dict[str, Any]:
      steps = self._arguments.steps
      optimizer = growth_arms.optimizer(rate)
      run = lab.train(
        growth_arms.LARGE,
        optimizer,
        lab.first_state(
          growth_arms.LARGE, optimizer, num_steps=steps, seed=seed
        ),
        num_steps=steps,
        seed=seed,
        restart_at=restart_at,
      )
      kind = 'scratch' if rate == growth_arms.RATE else f'scratch_rate_{rate:g}'
      name = kind if restart_at is None else 'scratch_restarted'
      return {'name': name, 'seed': seed, **_curve(run)}

    return task

  def _small(
    self, pair: str, seed: int
  ) -> Callable[[growth_lab.Lab], dict[str, Any]]:
    def task(lab: growth_lab.Lab) -> dict[str, Any]:
      steps, model = self._arguments.steps, growth_arms.PAIRS[pair]
      optimizer = growth_arms.optimizer()
      run = lab.train(
        model,
        optimizer,
        lab.first_state(model, optimizer, num_steps=steps, seed=seed),
        num_steps=steps,
        seed=seed,
      )
      leaves = {str(i): x for i, x in enumerate(jax.tree.leaves(run.state))}
      np.savez(self._folder / f'{seed}-small-{pair}.npz', **leaves)
      ratio = growth_lab.flops_per_token(model)
      ratio /= growth_lab.flops_per_token(growth_arms.LARGE)
      cost = {'pair': pair, 'cost_steps': steps * ratio}
      return {'name': 'small', 'seed': seed, **cost, **_curve(run)}

    return task

  def _arm(
    self, pair: str, name: str, arm: growth_arms.Arm, seed: int, target: float
  ) -> Callable[[growth_lab.Lab], dict[str, Any]]:
    def task(lab: growth_lab.Lab) -> dict[str, Any]:
      small = growth_arms.PAIRS[pair]
      optimizer = growth_arms.optimizer(warmup_steps=arm.warmup_steps)
      num_small, num_steps = self._arguments.steps, self._arguments.arm_steps
      structure = lab.structure(
        small, growth_arms.optimizer(), num_steps=num_small
      )
      with np.load(self._folder / f'{seed}-small-{pair}.npz') as saved:
        leaves = [saved[str(i)] for i in range(len(saved.files))]
      small_state = jax.tree.unflatten(structure, leaves)
      grown = lab.grow(
        arm.method,
        small,
        growth_arms.LARGE,
        small_state,
        learn=arm.learn,
        optimizer=optimizer,
        num_steps=self._arguments.steps,
        seed=seed,
        moments=arm.moments,
        beside=arm.beside,
      )
      flops, secs, state = (
        grown.operator_flops,
        grown.operator_secs,
        grown.state,
      )
      if arm.stage is not None:
        state, stage_flops, stage_secs = _stage(
          lab, arm, small, state, num_steps=num_steps, seed=seed
        )
        flops, secs = flops + stage_flops, secs + stage_secs
      course = growth_lab.Course()
      if arm.inherit.weight:
        course = growth_lab.Course(inherit=arm.inherit, small=small)
      run = lab.train(
        growth_arms.LARGE,
        optimizer,
        state,
        num_steps=num_steps,
        seed=seed,
        until=target,
        course=course,
        teacher=small_state.params if course.small else None,
      )
      if course.small:
        taught = inheritance.taught_steps(arm.inherit, num_steps=num_steps)
        taught = min(taught, run.steps[-1])
        # A forward pass is a third of a step.
        flops += taught * growth_lab.step_flops(small) / 3
      return {
        'name': name,
        'pair': pair,
        'seed': seed,
        'operator_steps': flops / growth_lab.step_flops(growth_arms.LARGE),
        'operator_secs': secs,
        'function_error': grown.function_error,
        'claimed': grown.claimed,
        **_curve(run),
      }

    return task


def _stage(
  lab: growth_lab.Lab,
  arm: growth_arms.Arm,
  small: TransformerConfig,
  state: Any,
  *,
  num_steps: int,
  seed: int,
) -> tuple[Any, float, float]:
  """The state after the stage, its FLOPs and seconds."""
  large, stage, optimizer = (
    growth_arms.LARGE,
    arm.stage,
    growth_arms.optimizer(),
  )
  assert stage is not None
  resting = ()
  if stage.rest_old:
    resting = depth.old_layers(methods.get(arm.method), small, large)
  course = growth_lab.Course(resting, stage.sub_model_layers)
  # Other text than that the whole model begins with.
  steps = min(stage.num_steps, num_steps)
  run = lab.train(
    large,
    optimizer,
    state,
    num_steps=steps,
    seed=seed + _STAGE_SEED,
    course=course,
  )
  grown = lab.grow(
    'stack',
    large,
    large,
    run.state,
    learn=LearnConfig(),
    optimizer=optimizer,
    num_steps=num_steps,
    seed=seed,
  )
  return grown.state, steps * growth_lab.step_flops(large, course), run.secs[-1]


def _fingerprint(arguments: argparse.Namespace) -> str:
  """Names what runs depend on, so that none of another kind is taken."""
  settings = (
    arguments.steps,
    arguments.arm_steps,
    growth_arms.LARGE,
    growth_arms.PAIRS,
    growth_arms.ABLATIONS if arguments.ablations else growth_arms.ARMS,
    growth_arms.optimizer(),
    harness.commit()['hash'],
  )
  return hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest()


def _curve(run: growth_lab.Run) -> dict[str, Any]:
  return {
    'steps': run.steps,
    'losses': run.losses,
    'secs': run.secs,
    'probe_loss': run.probe_loss,
    'probe_secs': run.probe_secs,
    'probe_steps': growth_lab.CHUNK,
  }


def main() -> None:
  """Measures the table."""
  arguments = _arguments()
  # Before the first device is asked for: a device of each core.
  jax.config.update('jax_num_cpu_devices', 2)
  options = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{options} --xla_cpu_multi_thread_eigen=false'
  arms = growth_arms.ARMS
  name = 'ligo_savings'
  if arguments.ablations:
    arms, name = growth_arms.ABLATIONS, 'ligo_ablations'
  if arguments.quick:
    arms = {
      pair: {name: growth_arms.ARMS[pair][name] for name in names}
      for pair, names in growth_arms.QUICK.items()
    }
  records = Benchmark(arguments).run(arms)
  candidates = {
    pair: auto.candidates(small, growth_arms.LARGE)
    for pair, small in growth_arms.PAIRS.items()
  }
  if arguments.quick or arguments.ablations:
    name += '_quick' if arguments.quick else ''
    candidates = {}
  table = growth_table.summary(records, candidates=candidates)
  harness.record(
    name,
    {
      **table,
      'num_seeds': arguments.seeds,
      'num_steps': arguments.steps,
      'num_arm_steps': arguments.arm_steps,
      'worker_secs': sum(x['worker_secs'] for x in records),
    },
  )
  # Behind the record, which says whether files differ from the commit.
  shown = harness.picture(
    name, 'Growing', growth_table.pictures(records, table)
  )
  print(shown, file=sys.stderr)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--quick', action='store_true', help='three arms, to check the machinery'
  )
  parser.add_argument(
    '--ablations', action='store_true', help='of the learned operator'
  )
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=600, help='from nothing')
  parser.add_argument('--arm_steps', type=int, default=600, help='at most')
  parser.add_argument(
    '--cache_dir', type=pathlib.Path, default='out/ligo_savings'
  )
  arguments = parser.parse_args()
  if arguments.quick and arguments.ablations:
    parser.error('--quick and --ablations do not go together.')
  if arguments.quick:
    arguments.seeds, arguments.steps, arguments.arm_steps = 1, 20, 20
  chunk = growth_lab.CHUNK
  for name in ('steps', 'arm_steps'):
    value = getattr(arguments, name)
    if value < 1 or value % (2 * chunk):
      parser.error(f'--{name}={value} must be a multiple of {2 * chunk}.')
  if arguments.seeds < 1:
    parser.error(f'--seeds={arguments.seeds} must be at least 1.')
  arguments.cache_dir = arguments.cache_dir.absolute()
  return arguments


if __name__ == '__main__':
  main()
