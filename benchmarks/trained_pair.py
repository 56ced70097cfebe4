"""A target and its drafter, trained on real text once and kept."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from efficient_llm import optimizer
from efficient_llm.data import dataset as dataset_lib
from efficient_llm.data import pipeline
from efficient_llm.models import presets, transformer
from efficient_llm.speculative import drafter_training, target_run
from efficient_llm.training import checkpoint, datasets, loop, pretrain

_DATA = pipeline.DataConfig(sequence_length=128, batch_size=16)


@dataclasses.dataclass(frozen=True)
class Pair:
  """What the benchmarks of speculation decode with.

  Attributes:
    config: The target's.
    params: The target's.
    draft_params: Its drafter's.
    validation: Text that neither has seen.
  """

  config: transformer.TransformerConfig
  params: Any
  draft_params: Any
  validation: dataset_lib.Dataset

  def prompts(self, count: int, *, num_tokens: int) -> np.ndarray:
    """Beginnings [count, num_tokens] of held-out sequences."""
    rows: list[np.ndarray] = []
    step = 0
    while len(rows) < count:
      rows.extend(np.asarray(self.validation.batch_at(step)['tokens']))
      step += 1
    return np.stack(rows[:count])[:, :num_tokens].astype(np.int32)


def load_or_train(
  cache_dir: pathlib.Path,
  *,
  size: str = 'ladder_1m',
  num_steps: int = 400,
  num_drafter_steps: int = 300,
) -> Pair:
  """Trains both where they are missing; an interrupted training goes on.

  Args:
    cache_dir: Folder of both runs.
    size: Preset of the target.
    num_steps: Of the target.
    num_drafter_steps: Of its drafter.
  """
  target_dir = cache_dir / f'{size}-{num_steps}'
  drafter_dir = cache_dir / f'{size}-{num_steps}-drafter-{num_drafter_steps}'
  target = load_or_train_target(cache_dir, size=size, num_steps=num_steps)
  drafter_training.train(
    drafter_training.DrafterConfig(
      target=str(target_dir),
      loss=drafter_training.DrafterLossConfig(num_passes=3),
      optimizer=optimizer.OptimizerConfig(
        learning_rate=6e-3, warmup_steps=30, schedule='wsd', decay_fraction=0.3
      ),
      loop=_loop(num_drafter_steps),
    ),
    workdir=drafter_dir,
  )
  _, validation = datasets.open_both(_DATA, cache_dir=target_dir / 'cache')
  assert validation is not None
  return Pair(
    config=target.model,
    params=target.restore_params(None),
    draft_params=drafter_training.load(drafter_dir).params,
    validation=validation,
  )


def load_or_train_target(
  cache_dir: pathlib.Path, *, size: str, num_steps: int
) -> target_run.TargetRun:
  """The run of a model of that size.

  Args:
    cache_dir: Folder of the run.
    size: Preset.
    num_steps: It is trained for.
  """
  target_dir = cache_dir / f'{size}-{num_steps}'
  pretrain.train(
    pretrain.PretrainConfig(
      model=presets.get(size),
      data=_DATA,
      optimizer=optimizer.OptimizerConfig(
        learning_rate=3e-3, warmup_steps=50, schedule='wsd', decay_fraction=0.3
      ),
      loop=_loop(num_steps),
    ),
    workdir=target_dir,
  )
  return target_run.find(target_dir)


def _loop(num_steps: int) -> loop.LoopConfig:
  return loop.LoopConfig(
    num_steps=num_steps,
    eval_every=100,
    eval_batches=16,
    checkpoint=checkpoint.CheckpointConfig(every_steps=100),
  )
