"""The stages of the line, in order: what each runs and what it begins with.

Every stage is a run of its own, in a folder of its own, with its own report:

    ladder/0 …      small models on the target's text
    prediction/     the scaling law's, before the target is trained
    scratch/        the target from nothing, with which others are compared
    growth/         the target out of the best rung
    islands/        the grown model on islands that hardly talk
    control/        the same with data-parallel training
    reasoning/      worked problems and a drafter, then reinforcement learning
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from efficient_llm.diloco import train as diloco
from efficient_llm.end_to_end.config import EndToEndConfig
from efficient_llm.ligo import train as ligo
from efficient_llm.models import transformer
from efficient_llm.scaling import job as scaling
from efficient_llm.scaling.config import ScalingConfig
from efficient_llm.tlt import start as tlt_start
from efficient_llm.tlt import train as tlt
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import pretrain, processes, task
from efficient_llm.training.config import PretrainConfig

# A rollout's pass over a few rows takes so many times what its share of a
# training pass does; only for the estimate of the time that is left.
_DECODING = 6


@dataclasses.dataclass(frozen=True)
class Stage:
  """One run of the line.

  Attributes:
    name: What it is called in result.json.
    title: What it is called on the screen.
    run: Runs it or goes on with it; how it ended, None for done.
    tell: What it found, in a line, once it is done.
    flops: Roughly, for the estimate of the time that is left.
  """

  name: str
  title: str
  run: Callable[[], task.Outcome | None]
  tell: Callable[[], str]
  flops: float


@dataclasses.dataclass(frozen=True)
class Line:
  """The line in a folder.

  Attributes:
    config: Checked before.
    workdir: Absolute.
  """

  config: EndToEndConfig
  workdir: pathlib.Path

  def stages(self) -> list[Stage]:
    """All stages, in order."""
    config, folder = self.config, self.workdir
    rungs = config.rungs(folder)
    scratch = config.scratch(folder)
    grown = config.grown(folder, small=folder, scratch=folder)
    control = config.control(folder, start=folder)
    reasoning = config.reasoned(start=folder)
    return [
      *(
        Stage(
          f'ladder_{i}',
          f'Ladder: {_count(rung)} parameters',
          lambda i=i, rung=rung: pretrain.train(rung, workdir=self.rung(i)),
          lambda i=i: f'loss {self.result(self.rung(i))["eval_loss"]:.3f}',
          _flops(rung),
        )
        for i, rung in enumerate(rungs)
      ),
      Stage(
        'prediction',
        f'Predict: the target of {_count(scratch)} parameters',
        self._predict,
        self._tell_prediction,
        0.0,
      ),
      Stage(
        'scratch',
        'The target from nothing, to compare with',
        lambda: pretrain.train(scratch, workdir=folder / 'scratch'),
        lambda: f'loss {self.result("scratch")["eval_loss"]:.3f}',
        _flops(scratch),
      ),
      Stage('growth', 'Grow', self._grow, self._tell_growth, _flops(grown)),
      Stage(
        'islands',
        f'Distribute: {config.islands.islands} islands',
        lambda: diloco.train(
          config.distributed(folder, start=folder / 'growth'),
          workdir=folder / 'islands',
        ),
        lambda: f'loss {self.result("islands")["eval_loss"]:.3f}',
        _flops(control),
      ),
      Stage(
        'control',
        'Data-parallel training, to compare with',
        lambda: pretrain.train(
          config.control(folder, start=folder / 'growth'),
          workdir=folder / 'control',
        ),
        lambda: f'loss {self.result("control")["eval_loss"]:.3f}',
        _flops(control),
      ),
      Stage(
        'supervised',
        'Reason: worked problems, and a first drafter',
        self._supervise,
        lambda: (
          'worked problems: loss '
          f'{self.result("reasoning/supervised")["eval_loss"]:.3f}'
        ),
        _flops(reasoning.supervised)
        + _flops(
          dataclasses.replace(reasoning.supervised, loop=reasoning.warmup.loop)
        )
        / 2,
      ),
      Stage(
        'reasoning',
        'Reason: reinforcement learning, with and without speculation',
        self._reason,
        self._tell_reasoning,
        _reasoning_flops(config),
      ),
    ]

  def rung(self, number: int) -> pathlib.Path:
    """Folder of a run of the ladder."""
    return self.workdir / 'ladder' / str(number)

  def result(self, folder: str | pathlib.Path) -> dict[str, Any]:
    """The result.json of a stage."""
    path = self.workdir / folder / 'result.json'
    return json.loads(path.read_text(encoding='utf-8'))

  def best_rung(self) -> int:
    """The rung of the lowest loss."""
    losses = [
      self.result(self.rung(i))['eval_loss']
      for i in range(len(self.config.ladder))
    ]
    return losses.index(min(losses))

  def _predict(self) -> None:
    largest = self.result(self.rung(len(self.config.ladder) - 1))
    target = self.config.scratch(self.workdir)
    # Of a step's tokens, a few are padding.
    per_step = largest['num_tokens'] / largest['num_steps']
    config = ScalingConfig(
      runs=str(self.workdir / 'ladder' / '*' / 'result.json'),
      target_params=float(transformer.num_params(target.model)),
      target_tokens=per_step * target.loop.num_steps,
    )
    processes.on_first(
      lambda: len(
        scaling.run(
          config, workdir=self.workdir / 'prediction', say=lambda line: None
        )
      )
    )

  def _tell_prediction(self) -> str:
    found = self.result('prediction')['predictions'][0]
    return (
      f'loss {found["loss"]:.3f}, {found["level"]:.0%} interval '
      f'{found["low"]:.3f} to {found["high"]:.3f}'
    )

  def _grow(self) -> task.Outcome:
    best = processes.on_first(self.best_rung)
    config = self.config.grown(
      self.workdir, small=self.rung(best), scratch=self.workdir / 'scratch'
    )
    return ligo.train(config, workdir=self.workdir / 'growth')

  def _tell_growth(self) -> str:
    result = self.result('growth')
    saved = result['growth'].get('warm_flops_saving')
    text = f'loss {result["eval_loss"]:.3f}'
    if saved is None:
      return f'{text}, never that of the target from nothing'
    return f'{text}; {saved:.0%} fewer FLOPs to the same loss'

  def _supervise(self) -> task.Outcome | None:
    start = tlt_start.prepare(
      self.config.reasoned(start=self.workdir / 'islands'),
      self.workdir / 'reasoning',
    )
    return start if isinstance(start, loop_lib.Outcome) else None

  def _reason(self) -> task.Outcome:
    folder = self.workdir / 'reasoning'
    config = self.config.reasoned(start=self.workdir / 'islands')
    config = dataclasses.replace(
      config,
      checkpoint=str(folder / 'supervised'),
      first_drafter=(
        str(folder / 'first_drafter') if config.needs_model else None
      ),
      plain_every=config.plain_every or 1,
      loop=dataclasses.replace(config.loop, eval_first=True),
    )
    return tlt.train(config, workdir=folder)

  def _tell_reasoning(self) -> str:
    result = self.result('reasoning')
    return (
      f'reward {result["eval_reward"]:.2f}; a step '
      f'{result["speedup_step"]:.2f} times as fast as without speculation'
    )


def _count(config: PretrainConfig) -> str:
  return f'{transformer.num_params(config.model):,}'


def _flops(config: PretrainConfig) -> float:
  return config.loop.num_steps * config.tokens_per_step * config.flops_per_token


def _reasoning_flops(config: EndToEndConfig) -> float:
  """Of answers with and without speculation, and of the updates."""
  tlt_config = config.reasoning
  rollout = tlt_config.rollout
  answers = rollout.num_prompts * rollout.group_size
  tokens = answers * rollout.sampling.max_new_tokens / 2
  per_token = transformer.flops_per_token(
    config.target.model, num_tokens=tlt_config.update.sequence_length
  )
  # Answers are of a third of a training pass each.
  passes = 1 + (1 + 1 / (tlt_config.plain_every or 1)) * _DECODING / 3
  return tlt_config.loop.num_steps * tokens * per_token * passes
