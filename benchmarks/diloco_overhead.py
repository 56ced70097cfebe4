"""What the island axis costs on one device: k = 1 against plain training.

    ./run.sh python -m benchmarks.diloco_overhead [--size=PRESET]

Both make the same steps on the same batch, in turns. Keys: `ratio`, the median
over rounds of the seconds of a step with one island to those without islands,
and `ratio_by_round`; the outer step of a round is in it once a
`sync_period`. For several islands on the device, `tokens_ratio` is the seconds
a token of four islands to those of one worker with all their rows.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import harness
from efficient_llm import optimizer, sharding
from efficient_llm.data import pipeline
from efficient_llm.diloco import mesh as mesh_lib
from efficient_llm.diloco.config import DilocoConfig
from efficient_llm.diloco.outer import OuterConfig
from efficient_llm.diloco.schedule import Schedule
from efficient_llm.diloco.train import Stepper
from efficient_llm.models import presets, transformer
from efficient_llm.training import loop, pretrain

_LENGTH, _ROWS = 128, 16
_SYNC_PERIOD = 10
_FAR = 1_000_000


def _config(size: str, *, islands: int) -> DilocoConfig:
  return DilocoConfig(
    model=presets.get(size),
    data=pipeline.DataConfig(
      sequence_length=_LENGTH, batch_size=_ROWS // islands
    ),
    optimizer=optimizer.OptimizerConfig(schedule='constant'),
    loop=loop.LoopConfig(num_steps=_FAR),
    islands=islands,
    sync_period=_SYNC_PERIOD,
    outer=OuterConfig('sgd', 1.0),
  )


def _batch(abstract: Any, vocab_size: int) -> Any:
  """Random tokens, with all targets counted."""

  def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if jax.tree_util.keystr(path) in ("['tokens']", "['targets']"):
      tokens = jax.random.randint(jax.random.key(0), leaf.shape, 0, vocab_size)
      return jax.device_put(tokens.astype(leaf.dtype), leaf.sharding)
    # One document a row, all of weight 1; places count up.
    rows = jax.numpy.ones(leaf.shape, leaf.dtype)
    if jax.tree_util.keystr(path) == "['positions']":
      rows = jax.numpy.cumsum(rows, -1) - 1
    return jax.device_put(rows.astype(leaf.dtype), leaf.sharding)

  return jax.tree_util.tree_map_with_path(fill, dict(abstract))


def _plain(size: str, num_steps: int) -> Callable[[], Any]:
  config = _config(size, islands=1)
  fields = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(pretrain.PretrainConfig)
  }
  plain = pretrain.PretrainConfig(**fields)
  devices = sharding.make_mesh(sharding.MeshConfig())
  program = pretrain.build(plain, devices)
  batch = _batch(program.abstract_batch, plain.model.vocab_size)
  state = program.init_state()

  def steps() -> Any:
    nonlocal state
    with jax.set_mesh(devices):
      for _ in range(num_steps):
        state, metrics = program.train_step(state, batch)
    return metrics, state.step

  return steps


def _islands(size: str, num_steps: int, *, islands: int) -> Callable[[], Any]:
  config = _config(size, islands=islands)
  devices = sharding.make_mesh(config.mesh)
  program = mesh_lib.build(config, devices)
  stepper = Stepper(config, program, Schedule(config))
  batch = _batch(program.abstract_batch, config.model.vocab_size)
  state = program.init_state()

  def steps() -> Any:
    nonlocal state
    with jax.set_mesh(devices):
      for _ in range(num_steps):
        state, metrics = stepper.step(state, batch)
    return metrics, state.versions_P

  return steps


def main() -> None:
  """Measures the two ratios."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='three rounds')
  parser.add_argument('--size', default='ladder_1m', help='preset')
  arguments = parser.parse_args()
  rounds, num_steps = (3 if arguments.quick else 15), _SYNC_PERIOD
  arms = {
    'plain': _plain(arguments.size, num_steps),
    'one': _islands(arguments.size, num_steps, islands=1),
    'four': _islands(arguments.size, num_steps, islands=4),
  }
  for arm in arms.values():
    jax.block_until_ready(arm())
  secs = harness.alternate(arms, rounds)

  def by_round(name: str) -> list[float]:
    return [a / b for a, b in zip(secs[name], secs['plain'], strict=True)]

  harness.record(
    'diloco_overhead',
    {
      'size': arguments.size,
      'num_params': transformer.num_params(presets.get(arguments.size)),
      'ratio': statistics.median(by_round('one')),
      'ratio_by_round': by_round('one'),
      'tokens_ratio': statistics.median(by_round('four')),
      'tokens_ratio_by_round': by_round('four'),
      'plain_step_secs': statistics.median(secs['plain']) / num_steps,
      'sync_period': _SYNC_PERIOD,
    },
  )


if __name__ == '__main__':
  main()
