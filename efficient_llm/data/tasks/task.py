"""What a task is: numbered problems, worked solutions and a reward function.

A problem follows from the seed, the split and its number alone, so any machine
can make any of them, in any order. A generator keeps the splits apart by the
hash of the prompt: no prompt that is trained on is ever validated on.

A reward function is plain Python, so that another process can run it:
`(prompts, completions, **columns) -> list[float | None]`, where the column
`answer` holds the answers of the problems. None is for a completion in which
no answer can be found, which is counted apart from a wrong one.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Literal, Protocol, TypeVar, get_args

import numpy as np

Split = Literal['train', 'validation']
Name = Literal[
  'trace',
  'arithmetic',
  'countdown',
  'sorting',
  'gsm8k',
  'jsonl',
  'reasoning_gym',
]
# One reward for each completion; None where it holds no answer.
Rewards = list[float | None]

# One problem in so many is held out.
_HELD_OUT_EVERY = 20
_FILE_TASKS = ('gsm8k', 'jsonl')
# The tasks that have a setting; the settings not named here belong to all.
_TASKS_WITH = {
  'slip': ('trace',),
  'max_steps': ('trace',),
  'max_digits': ('arithmetic',),
  'max_numbers': ('countdown',),
  'max_items': ('sorting',),
  'path': _FILE_TASKS,
  'validation_path': _FILE_TASKS,
  'dataset': ('reasoning_gym',),
  'dataset_size': ('reasoning_gym',),
}
_BOUNDS = {
  'seed': (0, 2**32 - 1),
  'max_steps': (1, 1000),
  'max_digits': (1, 18),
  'max_numbers': (2, 6),
  'max_items': (2, 100),
  'dataset_size': (1, 2**29),
}
_Drawn = TypeVar('_Drawn')


@dataclasses.dataclass(frozen=True)
class Problem:
  """One problem.

  Attributes:
    prompt: What a completion continues.
    answer: What the reward function compares a completion with.
    worked: A worked solution, exactly as a completion should read; None where
      there is none.
  """

  prompt: str
  answer: str
  worked: str | None


class Task(Protocol):
  """Numbered problems of one kind.

  Attributes:
    name: As in `TaskConfig`.
    reward: The reward function, as 'module:function'.
    words: Vocabulary of a word-level tokenizer that suits the texts; None
      where they are for tokenizers of any text.
    num_problems: Problems to train on; None for a task without end.
    num_validation_problems: Problems held out; None for a task without end.
  """

  name: str
  reward: str
  words: tuple[str, ...] | None
  num_problems: int | None
  num_validation_problems: int | None

  def problem(self, index: int, *, split: Split) -> Problem:
    """Makes one problem.

    Args:
      index: Its number, from 0 to below that of the split's problems.
      split: Which problems are numbered.

    Raises:
      ValueError: If there is no problem of that number.
    """
    ...


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """Settings of a task; each difficulty belongs to one task.

  Attributes:
    name: Which task.
    seed: Of the problems; for files, of their order.
    slip: trace: Chance that a step of a worked solution to train on makes a
      careless slip. Validation problems and answers have none.
    max_steps: trace: Problems that need more steps are drawn again.
    max_digits: arithmetic: Most digits of a number.
    max_numbers: countdown: Most numbers given.
    max_items: sorting: Most integers in a list.
    path: gsm8k, jsonl: The file.
    validation_path: gsm8k, jsonl: Another file to validate on, instead of one
      problem in 20 of `path`.
    dataset: reasoning_gym: Name of the data set.
    dataset_size: reasoning_gym: Number of problems of each split.
  """

  name: Name = 'trace'
  seed: int = 0
  slip: float = 0.0
  max_steps: int = 24
  max_digits: int = 6
  max_numbers: int = 4
  max_items: int = 12
  path: str | None = None
  validation_path: str | None = None
  dataset: str | None = None
  dataset_size: int = 10_000

  def validate(self) -> None:
    """Checks all that can be checked without opening a file.

    Raises:
      ValueError: With the rule, the value and the remedy, in one line.
    """
    if self.name not in get_args(Name):
      raise ValueError(
        f'name={self.name!r} must be one of {get_args(Name)}; set task.name.'
      )
    for field in dataclasses.fields(self):
      tasks = _TASKS_WITH.get(field.name)
      value = getattr(self, field.name)
      if tasks and self.name not in tasks and value != field.default:
        raise ValueError(
          f'{field.name}={value!r} must be left alone with task.name='
          f'{self.name!r}, as it belongs to {" and ".join(tasks)}; '
          f'set task.{field.name}={field.default!r}.'
        )
    for name, (smallest, largest) in _BOUNDS.items():
      if not smallest <= getattr(self, name) <= largest:
        raise ValueError(
          f'{name}={getattr(self, name)} must be from {smallest} to {largest}; '
          f'set task.{name}.'
        )
    if not 0 <= self.slip < 1:
      raise ValueError(f'slip={self.slip} must be in [0, 1); set task.slip.')
    if self.name in _FILE_TASKS and not self.path:
      raise ValueError(
        f'path={self.path!r} must name the file of task {self.name!r}; '
        'set task.path.'
      )
    if self.name == 'reasoning_gym' and not self.dataset:
      raise ValueError(
        f'dataset={self.dataset!r} must name a data set of reasoning_gym; '
        'set task.dataset.'
      )


def generator(
  seed: int, name: str, split: Split, index: int
) -> np.random.Generator:
  """Makes the random stream of one problem, the same on any machine."""
  digest = hashlib.blake2b(
    f'{seed}/{name}/{split}/{index}'.encode(), digest_size=16
  ).digest()
  # Named rather than default_rng, which may come to mean another one.
  return np.random.Generator(np.random.PCG64(int.from_bytes(digest, 'big')))


def is_held_out(text: str) -> bool:
  """Says whether the hash of a text puts it among the validation problems."""
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') % _HELD_OUT_EVERY == 0


def draw(
  rng: np.random.Generator,
  draw_one: Callable[[np.random.Generator], tuple[str, _Drawn] | None],
  *,
  split: Split,
) -> tuple[str, _Drawn]:
  """Draws from one stream until a prompt belongs to the split.

  Args:
    rng: The stream of the problem.
    draw_one: Gives a prompt and what it was made from; None to draw again.
    split: The split.

  Returns:
    The first that belongs to the split.
  """
  while True:
    drawn = draw_one(rng)
    if drawn and is_held_out(drawn[0]) == (split == 'validation'):
      return drawn


def truncated_geometric(
  rng: np.random.Generator, *, smallest: int, largest: int, mean_excess: float
) -> int:
  """Draws a length whose chances fall by one ratio from each to the next.

  Args:
    rng: The stream to draw from.
    smallest: The likeliest length.
    largest: Longer ones are drawn again.
    mean_excess: Mean length above `smallest`, were there no largest one.
  """
  while True:
    length = smallest - 1 + int(rng.geometric(1 / (1 + mean_excess)))
    if length <= largest:
      return length


def check_index(index: int, num_problems: int, *, split: Split) -> None:
  """Refuses the number of a problem that does not exist."""
  if not 0 <= index < num_problems:
    raise ValueError(
      f'{index=} must be from 0 to below the {num_problems} {split} problems; '
      'give a larger file or data set, or task.validation_path.'
    )
