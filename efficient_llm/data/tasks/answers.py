"""Finds the final answer in a completion, however odd the rest of it is."""

import re
from collections.abc import Callable, Sequence

from efficient_llm.data.tasks import task

MARK = 'answer:'
# Python refuses to read integers of thousands of digits, which a model that
# repeats itself does write.
_INTEGER = re.compile(r'[+-]?[0-9]{1,100}')


def final(completion: str) -> str | None:
  """Returns what follows the last 'answer:'; None if there is nothing."""
  return completion.rpartition(MARK)[2].strip() if MARK in completion else None


def integers(completion: str) -> list[int] | None:
  """Reads the final answer as integers between blanks; None if it is not."""
  words = (final(completion) or '').split()
  if not words or not all(_INTEGER.fullmatch(word) for word in words):
    return None
  return [int(word) for word in words]


def score(
  completions: Sequence[str],
  answers: Sequence[str],
  is_right: Callable[[str, str], bool | None],
) -> task.Rewards:
  """Gives 1.0 for right, 0.0 for wrong and None for no answer.

  Args:
    completions: What was written.
    answers: The answer of each problem.
    is_right: Judges a completion by an answer; None where it finds none.
  """
  judged = (is_right(c, a) for c, a in zip(completions, answers, strict=True))
  return [None if right is None else float(right) for right in judged]
