"""A run of islands: the one training loop over the programs of `mesh`."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from efficient_llm import sharding
from efficient_llm.diloco import batches as batches_lib
from efficient_llm.diloco import mesh as mesh_lib
from efficient_llm.diloco import screening
from efficient_llm.diloco.config import DilocoConfig
from efficient_llm.diloco.schedule import Schedule
from efficient_llm.diloco.state import DilocoState
from efficient_llm.models import transformer
from efficient_llm.training import (
  batch_layout,
  chart,
  datasets,
  evaluation,
  metrics,
  results,
  samples,
  saved_run,
  sections,
  step_folders,
  trained_run,
)
from efficient_llm.training import loop as loop_lib


def train(
  config: DilocoConfig, *, workdir: str | pathlib.Path
) -> loop_lib.Outcome:
  """Trains, evaluates, samples and writes result.json and report.html.

  A second call with the same working directory continues the first, also with
  another number of islands.
  """
  config.validate()
  workdir = pathlib.Path(workdir)
  mesh = sharding.make_mesh(config.mesh)
  program = mesh_lib.build(config, mesh)
  dataset, validation = datasets.open_both(
    config.data, cache_dir=workdir / 'cache'
  )
  datasets.check_vocabulary(config.model, dataset)
  prompts = samples.encode(
    config.sample_prompts,
    datasets.tokenizer_of(dataset),
    config.model,
    config.sampling,
  )
  local, share = batch_layout.island_share(
    program.batch_sharding,
    num_islands=config.islands,
    batch_size=config.data.batch_size,
  )
  evaluate = evaluation.of_state(
    validation,
    eval_step=program.eval_step,
    place=functools.partial(sharding.to_global, sharding=program.eval_sharding),
    num_batches=config.loop.eval_batches,
    process=batch_layout.process_share(
      program.eval_sharding, config.data.batch_size
    ),
  )
  logging.info(
    '%d islands of %s parameters; each sends %s bytes in %d steps',
    config.islands,
    f'{transformer.num_params(config.model):,}',
    f'{sum(program.sent_bytes):,}',
    config.sync_period,
  )
  schedule = Schedule(config)
  stepper = Stepper(config, program, schedule)
  with (
    jax.set_mesh(mesh),
    batches_lib.IslandBatches(
      dataset,
      schedule,
      num_islands=config.islands,
      local=local,
      process=share,
    ) as batches,
  ):
    outcome = loop_lib.run(
      config.loop,
      loop_lib.Task(
        title='diloco',
        step=stepper.step,
        batches=batches,
        place=functools.partial(
          sharding.to_global, sharding=program.batch_sharding
        ),
        evaluate=evaluate,
        metadata=results.checkpoint_metadata(config, dataset),
        unit=config.unit,
        flops_per_token=config.flops_per_token,
        read=stepper.read,
      ),
      make_state=functools.partial(first_state, config, program),
      abstract_state=program.abstract_state(saved_islands(config, workdir)),
      workdir=workdir,
    )
    if outcome.stopped_by is None:
      result = results.describe(
        config, outcome, dataset=dataset, prompts=prompts, mesh=mesh
      )
      rounds = jax.device_get(outcome.state.versions_P)
      if config.method == 'delayed':
        # Every arrival is a round of its own.
        rounds = rounds / config.islands
      sent = int(np.dot(rounds, program.sent_bytes))
      result |= {'islands': config.islands, 'sent_bytes_per_island': sent}
      results.finish(
        result,
        workdir=workdir,
        title='Training on islands',
        more=[*_sections(config, workdir)],
      )
  return outcome


def first_state(config: DilocoConfig, program: mesh_lib.Program) -> DilocoState:
  """State of step 0, from another run's parameters where one is named.

  Args:
    config: The run.
    program: Its compiled functions.

  Raises:
    ValueError: If there are none, or they are of another model.
  """
  state = program.init_state()
  if not config.start:
    return state
  params = trained_run.start_params(
    config.start, config.model, program.abstract_state(config.islands).params
  )
  return program.started(state, params)


class Stepper:
  """The loop's step: an inner one, and what comes after it.

  Args:
    config: The run.
    program: Its compiled functions.
    schedule: Says what comes when.
  """

  def __init__(
    self, config: DilocoConfig, program: mesh_lib.Program, schedule: Schedule
  ):
    self._config, self._program = config, program
    self._schedule = schedule
    self._done: int | None = None

  def step(self, state: DilocoState, batch: Any) -> tuple[DilocoState, Any]:
    """One inner step of every island, and the syncs that are due."""
    if self._done is None:
      self._done = int(state.step)
      state = self._program.resized(state)
    number, islands, tokens_PM, values = self._program.inner_step(
      state.step, state.islands, state.tokens_PM, batch
    )
    state = state.replace(step=number, islands=islands, tokens_PM=tokens_PM)
    self._done += 1
    rounds = []
    for event in self._schedule.events(self._done):
      state, found = self._program.outer_step(state, event)
      if found is not None:
        rounds.append((event.fragment, found))
    # Only what lies in this process: nothing crosses islands for a metric.
    return state, ({name: _local(x) for name, x in values.items()}, rounds)

  def read(self, fetched: Any) -> Mapping[str, Any]:
    """Metrics of a step as scalars, on the host.

    The loss is the mean over this process's islands by tokens. An island whose
    loss is not finite does not stop the run, as it will be refused; only when
    there is no other does the step count as such.
    """
    inner, rounds = fetched
    values = {name: np.concatenate(x) for name, x in inner.items()}
    trains_M = values.pop('trains', np.ones(len(values['loss']), bool))
    finite_M = values.pop('finite') & trains_M
    weights_M = np.where(finite_M, values.pop('tokens'), 0.0)
    total = float(weights_M.sum())
    line: dict[str, Any] = {
      name: float(np.dot(np.where(finite_M, x, 0), weights_M) / total)
      if total
      else float('nan')
      for name, x in values.items()
    }
    first = jax.process_index() * len(trains_M)
    for m, loss in enumerate(values['loss']):
      if finite_M[m]:
        line[f'island_{first + m}/loss'] = float(loss)
    groups = self._config.islands / len(trains_M)
    line |= {
      'tokens': total * groups,
      'finite': bool(finite_M.any() or not trains_M.any()),
    }
    for fragment, found in rounds:
      line |= self._read_round(fragment, found)
    return line

  def _read_round(self, fragment: int, found: Any) -> dict[str, float]:
    line = {
      'outer_step_norm': float(found['moved']),
      'sent_bytes': float(self._program.sent_bytes[fragment]),
      'refused': float((found['codes_M'] > 0).sum()),
    }
    for m in np.flatnonzero(found['sent_M']):
      code = int(found['codes_M'][m])
      if code:
        logging.warning(
          'Island %d refused: its update is %s.', m, screening.REASONS[code]
        )
      line[f'island_{m}/outer_gradient_norm'] = float(found['norms_M'][m])
      line[f'island_{m}/outer_gradient_cosine'] = float(found['cosines_M'][m])
    return line


def saved_islands(config: DilocoConfig, workdir: pathlib.Path) -> int:
  """How many islands the run's newest checkpoint has."""
  try:
    metadata = saved_run.read_metadata(workdir / 'checkpoints')
  except (step_folders.CheckpointError, OSError):
    # None yet, or none that is whole: the loop says so.
    return config.islands
  return int(metadata['config'].get('islands', config.islands))


def _local(x: jax.Array) -> list[jax.Array]:
  """The distinct parts of an array that lie in this process, in order."""
  parts = {
    shard.index[0].start or 0: shard.data for shard in x.addressable_shards
  }
  return [parts[start] for start in sorted(parts)]


def _sections(
  config: DilocoConfig, workdir: pathlib.Path
) -> list[sections.Section]:
  """Curves by island, and what was sent."""
  records = metrics.read_metrics(workdir, kind='train')
  curves: list[sections.Section] = []
  for title, name, unit in (
    ('Loss by island', 'loss', 'nats per token'),
    ('Outer gradients by island', 'outer_gradient_norm', 'Euclidean norm'),
    ('Agreement', 'outer_gradient_cosine', 'cosine with the other islands'),
  ):
    series = []
    for m in range(config.islands):
      kept = [x for x in records if f'island_{m}/{name}' in x]
      if kept:
        series.append(
          chart.Series(
            f'island {m}',
            [x['step'] for x in kept],
            [x[f'island_{m}/{name}'] for x in kept],
          )
        )
    if series:
      curves.append(chart.Curve(title, series, 'steps', unit))
  return curves
