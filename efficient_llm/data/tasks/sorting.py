"""Sorting a list of integers by selection, which writes down every step.

A step is as long as what is left of the list, so lengths grow with the square
of the number of integers, which is drawn with a tail itself.
"""

from collections.abc import Sequence

import numpy as np

from efficient_llm.data.tasks import answers, task

_MEAN_MORE_ITEMS = 4.0


class SortingTask:
  """Lists of integers to sort, without end."""

  name: str = 'sorting'
  reward: str = f'{__name__}:reward'
  words: tuple[str, ...] | None = None
  num_problems: int | None = None
  num_validation_problems: int | None = None

  def __init__(self, config: task.TaskConfig):
    self._config = config

  def problem(self, index: int, *, split: task.Split) -> task.Problem:
    rng = task.generator(self._config.seed, self.name, split, index)
    prompt, items = task.draw(rng, self._draw, split=split)
    answer = _listed(sorted(items))
    worked = '\n'.join([*_select(items), f'{answers.MARK} {answer}'])
    return task.Problem(prompt, answer, worked)

  def _draw(self, rng: np.random.Generator) -> tuple[str, list[int]]:
    count = task.truncated_geometric(
      rng,
      smallest=2,
      largest=self._config.max_items,
      mean_excess=_MEAN_MORE_ITEMS,
    )
    items = rng.integers(0, 100, count).tolist()
    return f'Sort {_listed(items)}.\n', items


def reward(
  prompts: Sequence[str],
  completions: Sequence[str],
  *,
  answer: Sequence[str],
  **columns: Sequence[object],
) -> task.Rewards:
  """Rewards the sorted list behind the last 'answer:'."""
  del prompts, columns
  return answers.score(completions, answer, _is_right)


def _is_right(completion: str, answer: str) -> bool | None:
  found = answers.integers(completion)
  return None if found is None else found == [int(i) for i in answer.split()]


def _select(items: Sequence[int]) -> list[str]:
  """Takes the least of what is left, step by step."""
  left, lines = list(items), []
  while len(left) > 1:
    least = min(left)
    left.remove(least)
    lines.append(f'take {least}, left {_listed(left)}')
  return lines


def _listed(items: Sequence[int]) -> str:
  return ' '.join(map(str, items))
