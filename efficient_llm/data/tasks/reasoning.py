"""Problems of reasoning_gym, a collection of generators with verifiers.

The package is an extra: `pip install reasoning-gym`. A completion gives its
answer between <answer> and </answer>, as the package's own prompts ask for.
Rewards may lie between 0 and 1, as its verifiers give credit for parts.
"""

import ast
import functools
import importlib
import re
import types
from collections.abc import Callable, Sequence

import numpy as np

from efficient_llm.data.tasks import task

_PIP_NAME = 'reasoning-gym'
_INSTRUCTION = 'Give the final answer between <answer> and </answer>.'
_ANSWER = re.compile(r'<answer>(.*?)</answer>', re.DOTALL)
# The package makes a problem from the sum of seed and index, so the seeds of
# the two splits must be further apart than a data set is large.
_NUM_SEEDS = 2**29
_FIRST_SEEDS = {'train': 0, 'validation': 2**30}


class ReasoningGymTask:
  """Problems of one data set of reasoning_gym.

  A few of its data sets depend on the order of Python sets, and are the same
  in another process only under the same PYTHONHASHSEED.
  """

  name: str = 'reasoning_gym'
  reward: str = f'{__name__}:reward'
  words: tuple[str, ...] | None = None

  def __init__(self, config: task.TaskConfig):
    self._dataset = str(config.dataset)
    self._size = config.dataset_size
    self.num_problems: int | None = config.dataset_size
    self.num_validation_problems: int | None = config.dataset_size
    package = _package()
    self._splits = {}
    for split in ('train', 'validation'):
      rng = task.generator(config.seed, self.name, split, 0)
      seed = _FIRST_SEEDS[split] + int(rng.integers(_NUM_SEEDS))
      try:
        self._splits[split] = package.create_dataset(
          self._dataset, seed=seed, size=config.dataset_size
        )
      # Settings that a data set cannot do without are asserted there.
      except (ValueError, AssertionError) as error:
        raise ValueError(
          f'dataset={self._dataset!r} must be a data set of reasoning_gym: '
          f'{" ".join(str(error).split())}; set task.dataset.'
        ) from error

  def problem(self, index: int, *, split: task.Split) -> task.Problem:
    task.check_index(index, self._size, split=split)
    entry = self._splits[split][index]
    # Not JSON, which turns the tuples that some verifiers compare into lists.
    value = {'dataset': self._dataset, 'entry': _plain(entry)}
    answer = repr(value)
    if not _is_literal(answer, value):
      raise ValueError(
        f'dataset={self._dataset!r} must give entries of plain Python values, '
        f'as a verifier elsewhere reads them, found {answer[:80]}; '
        'set task.dataset.'
      )
    prompt = f'{entry["question"].rstrip()}\n{_INSTRUCTION}\n'
    return task.Problem(prompt, answer, worked=None)


def reward(
  prompts: Sequence[str],
  completions: Sequence[str],
  *,
  answer: Sequence[str],
  **columns: Sequence[object],
) -> task.Rewards:
  """Rewards what reasoning_gym finds right; None without a tagged answer."""
  del prompts, columns
  return [_score(c, a) for c, a in zip(completions, answer, strict=True)]


def _score(completion: str, answer: str) -> float | None:
  found = _ANSWER.findall(completion)
  if not found:
    return None
  problem = ast.literal_eval(answer)
  verify = _verifier(problem['dataset'])
  return float(verify(answer=found[-1].strip(), entry=problem['entry']))


@functools.cache
def _verifier(dataset: str) -> Callable[..., float]:
  return _package().get_score_answer_fn(dataset)


def _plain(value: object) -> object:
  """Replaces NumPy's scalars, which some data sets hold, by Python's."""
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, dict):
    return {_plain(key): _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple, set)):
    return type(value)(map(_plain, value))
  return value


def _is_literal(text: str, value: object) -> bool:
  try:
    return ast.literal_eval(text) == value
  except (ValueError, SyntaxError):
    return False


def _package() -> types.ModuleType:
  try:
    return importlib.import_module('reasoning_gym')
  except ImportError as error:
    raise ValueError(
      "task 'reasoning_gym' needs the package of that name: "
      f'{error}; pip install {_PIP_NAME}.'
    ) from error
