"""What a run begins with: a model and its drafter, made first where missing."""

import dataclasses
import pathlib

from efficient_llm import typing
from efficient_llm.data import tokenizer as tokenizer_lib
from efficient_llm.data.tasks import registry
from efficient_llm.data.tasks import task as task_lib
from efficient_llm.speculative import drafter_training, target_run
from efficient_llm.tlt import problems
from efficient_llm.tlt.config import TltConfig
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import pretrain, processes, trained_run


@dataclasses.dataclass(frozen=True)
class Start:
  """What a run of reinforcement learning begins with.

  Attributes:
    target: Checkpoint of the model.
    drafter_params: Of a drafter for it; None where none is needed.
    task: The problems.
  """

  target: target_run.TargetRun
  drafter_params: typing.Params | None
  task: task_lib.Task


def prepare(
  config: TltConfig, workdir: pathlib.Path
) -> Start | loop_lib.Outcome:
  """Makes the model and the drafter that the run begins with, if need be.

  Returns:
    What was made, or how the stage ended that a signal interrupted.
  Raises:
    ValueError: If the first drafter is another model's.
  """
  task = registry.make(config.task)
  folder = config.checkpoint
  if folder is None:
    folder = workdir / 'supervised'
    outcome = _supervise(config, task, folder)
    if outcome.stopped_by is not None:
      return outcome
  target = target_run.find(folder, name='checkpoint')
  problems.check_room(
    task, target.load_tokenizer(), max_prompt_tokens=config.max_prompt_tokens
  )
  if not config.needs_model:
    return Start(target, None, task)
  drafter = config.first_drafter
  if drafter is None:
    drafter = workdir / 'first_drafter'
    warmup = dataclasses.replace(config.warmup, target=target.reference)
    outcome = drafter_training.train(warmup, workdir=drafter)
    if outcome.stopped_by is not None:
      return outcome
  saved = drafter_training.load(drafter)
  target_run.check_same(
    target, saved.meta['target'], drafter=f'first_drafter={drafter}'
  )
  return Start(target, saved.params, task)


def _supervise(
  config: TltConfig, task: task_lib.Task, folder: pathlib.Path
) -> loop_lib.Outcome:
  """Makes a model from worked examples, as any pre-training run.

  One that starts from another run keeps its model and its tokenizer.
  """
  path, tokenizer = processes.on_first(
    lambda: problems.write_worked(
      task, num_examples=config.num_examples, folder=folder
    )
  )
  data = dataclasses.replace(config.supervised.data, path=path)
  model = config.supervised.model
  if config.supervised.start:
    run = trained_run.find(config.supervised.start, name='supervised.start')
    model = run.model
    tokenizer = processes.on_first(lambda: _keep_tokenizer(run, folder))
    data = dataclasses.replace(data, tokenizer=tokenizer)
  elif tokenizer is not None:
    data = dataclasses.replace(data, tokenizer=tokenizer)
    size = tokenizer_lib.load(tokenizer).vocab_size
    model = dataclasses.replace(model, vocab_size=-(-size // 16) * 16)
  if data.bpe_vocab_size is None:
    problems.check_room(
      task,
      tokenizer_lib.load(data.tokenizer),
      max_prompt_tokens=config.max_prompt_tokens,
    )
  return pretrain.train(
    dataclasses.replace(config.supervised, data=data, model=model),
    workdir=folder,
  )


def _keep_tokenizer(run: trained_run.TrainedRun, folder: pathlib.Path) -> str:
  """What the run's tokenizer is called, copied if that run has trained it."""
  if run.data.bpe_vocab_size is None:
    return run.data.tokenizer
  (name, content), *_ = run.load_tokenizer().files().items()
  path = folder / name
  path.write_bytes(content)
  return str(path)
