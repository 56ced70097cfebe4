"""Problems as rows of tokens: what rollouts begin with and rewards compare."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from efficient_llm.data import tokenizer as tokenizer_lib
from efficient_llm.data.tasks import task as task_lib
from efficient_llm.data.tasks import words
from efficient_llm.training import strict_json

# Problems that are looked at before a model is trained for them.
_LOOKED_AT = 256


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Problems of a step, one row for each answer that is wanted.

  Attributes:
    texts: Prompts.
    answers: What completions are compared with.
    tokens_NP: Prompts behind the tokenizer's bos, padded on the right.
    lengths_N: Their tokens.
    groups_N: Number of the problem.
  """

  texts: list[str]
  answers: list[str]
  tokens_NP: np.ndarray
  lengths_N: np.ndarray
  groups_N: np.ndarray

  def take(self, rows_N: np.ndarray) -> 'Prompts':
    """Those that a mask says."""
    rows = np.flatnonzero(rows_N)
    return Prompts(
      texts=[self.texts[row] for row in rows],
      answers=[self.answers[row] for row in rows],
      tokens_NP=self.tokens_NP[rows],
      lengths_N=self.lengths_N[rows],
      groups_N=self.groups_N[rows],
    )


def encode(
  problems: Sequence[task_lib.Problem],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  group_size: int,
  max_prompt_tokens: int,
) -> Prompts:
  """Makes `group_size` rows of each problem.

  Raises:
    ValueError: If a prompt has more tokens than there is room for.
  """
  bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  rows = [[*bos, *tokenizer.encode(x.prompt).tolist()] for x in problems]
  longest = max(map(len, rows))
  if longest > max_prompt_tokens:
    raise ValueError(
      f'max_prompt_tokens={max_prompt_tokens} must hold every prompt, one has '
      f'{longest} tokens; set --config.max_prompt_tokens={longest}.'
    )
  tokens = np.zeros((len(rows), max_prompt_tokens), np.int32)
  for index, row in enumerate(rows):
    tokens[index, : len(row)] = row
  chosen = np.repeat(np.arange(len(rows)), group_size)
  return Prompts(
    texts=[problems[int(i)].prompt for i in chosen],
    answers=[problems[int(i)].answer for i in chosen],
    tokens_NP=tokens[chosen],
    lengths_N=np.asarray([len(row) for row in rows], np.int32)[chosen],
    groups_N=chosen.astype(np.int32),
  )


def check_room(
  task: task_lib.Task,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  max_prompt_tokens: int,
) -> None:
  """Looks at a task's first problems before anything is trained for them.

  Raises:
    ValueError: If a prompt has more tokens than there is room for.
  """
  count = min(_LOOKED_AT, task.num_problems or _LOOKED_AT)
  encode(
    [task.problem(i, split='train') for i in range(count)],
    tokenizer,
    group_size=1,
    max_prompt_tokens=max_prompt_tokens,
  )


class Source:
  """The problems of a run, by number."""

  def __init__(
    self,
    task: task_lib.Task,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    group_size: int,
    num_examples: int,
    max_prompt_tokens: int,
  ):
    """Holds what problems are made with.

    Args:
      task: Whose problems.
      tokenizer: Of the policy.
      group_size: Answers to each problem that is trained on.
      num_examples: Problems before the first, which were worked examples; a
        task with an end has no others.
      max_prompt_tokens: Room for a prompt.
    """
    self._task, self._tokenizer = task, tokenizer
    self._group_size, self._num_examples = group_size, num_examples
    self._max_prompt_tokens = max_prompt_tokens

  def training(self, numbers: np.ndarray) -> Prompts:
    """Problems by their numbers in the run, which are those of the groups."""
    ids = numbers + self._num_examples
    if self._task.num_problems is not None:
      ids = numbers % self._task.num_problems
    found = [self._task.problem(int(i), split='train') for i in ids]
    prompts = self._encode(found, group_size=self._group_size)
    groups_N = np.repeat(numbers, self._group_size).astype(np.int32)
    return dataclasses.replace(prompts, groups_N=groups_N)

  def validation(self, count: int) -> Prompts:
    """The first held-out problems, a row for each."""
    if self._task.num_validation_problems is not None:
      count = min(count, self._task.num_validation_problems)
    found = [self._task.problem(i, split='validation') for i in range(count)]
    return self._encode(found, group_size=1)

  def _encode(
    self, found: Sequence[task_lib.Problem], *, group_size: int
  ) -> Prompts:
    return encode(
      found,
      self._tokenizer,
      group_size=group_size,
      max_prompt_tokens=self._max_prompt_tokens,
    )


def write_worked(
  task: task_lib.Task, *, num_examples: int, folder: pathlib.Path
) -> tuple[str, str | None]:
  """Writes worked examples for a supervised stage, once.

  Args:
    task: Whose training problems have worked solutions.
    num_examples: At most so many.
    folder: Gets examples.jsonl, and tokenizer.json where the task has words.
  Returns:
    Paths of the text, and of the tokenizer or None.
  Raises:
    ValueError: If the task has no worked solutions.
  """
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer = None
  if task.words is not None:
    path = folder / 'tokenizer.json'
    strict_json.write_atomically(path, words.tokenizer_json(task.words))
    tokenizer = str(path)
  count = num_examples
  if task.num_problems is not None:
    count = min(count, task.num_problems)
  found = [task.problem(index, split='train') for index in range(count)]
  lines = [
    json.dumps({'text': x.prompt + _gap(x.prompt) + x.worked})
    for x in found
    if x.worked is not None
  ]
  if not lines:
    raise ValueError(
      f'task.name={task.name!r} must have worked solutions for a supervised '
      'stage; give a --checkpoint instead.'
    )
  path = folder / 'examples.jsonl'
  strict_json.write_atomically(path, '\n'.join(lines) + '\n')
  return str(path), tokenizer


def _gap(prompt: str) -> str:
  """What parts a prompt from its completion where the prompt does not."""
  return '' if prompt[-1:].isspace() else ' '
