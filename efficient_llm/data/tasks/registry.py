"""Makes a task from its settings."""

from collections.abc import Callable

from efficient_llm.data.tasks import (
  arithmetic,
  countdown,
  files,
  reasoning,
  sorting,
  task,
  trace,
)

_TASKS: dict[task.Name, Callable[[task.TaskConfig], task.Task]] = {
  'trace': trace.TraceTask,
  'arithmetic': arithmetic.ArithmeticTask,
  'countdown': countdown.CountdownTask,
  'sorting': sorting.SortingTask,
  'gsm8k': files.Gsm8kTask,
  'jsonl': files.JsonlTask,
  'reasoning_gym': reasoning.ReasoningGymTask,
}


def make(config: task.TaskConfig) -> task.Task:
  """Makes the task of a configuration, reading its file where it has one.

  Raises:
    ValueError: If a setting is wrong, a file cannot be read as promised or an
      optional package is missing.
  """
  config.validate()
  return _TASKS[config.name](config)
