"""Problems from a file: GSM8K, or any JSON lines with a prompt and an answer.

One problem in 20 is held out, by the hash of its number in the file, unless
there is a file to validate on. Each split comes in a random order of its own.
"""

import decimal
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from efficient_llm.data.tasks import answers, task

_GSM8K_MARK = '####'
# What the data set's authors had a calculator fill in.
_CALCULATION = re.compile(r'<<[^<>]*>>')
_IGNORED = re.compile(r'[\s,$]')
# A unit may follow, but no second number. Bounded, as a model that repeats
# itself writes thousands of digits.
_NUMBER = re.compile(
  r'([+-]?(?:[0-9]{1,100}(?:\.[0-9]{0,100})?|\.[0-9]{1,100}))[^0-9]*'
)

_Record = Mapping[str, object]


class FileTask:
  """Problems of a JSON-lines file; see `Gsm8kTask` and `JsonlTask`."""

  words: tuple[str, ...] | None = None

  def __init__(
    self,
    config: task.TaskConfig,
    to_problem: Callable[[_Record], task.Problem],
  ):
    problems = _read(str(config.path), to_problem)
    if config.validation_path:
      splits = {
        'train': problems,
        'validation': _read(config.validation_path, to_problem),
      }
    else:
      splits: dict[str, list[task.Problem]] = {'train': [], 'validation': []}
      for number, problem in enumerate(problems):
        is_held_out = task.is_held_out(str(number))
        splits['validation' if is_held_out else 'train'].append(problem)
    for split in ('train', 'validation'):
      rng = task.generator(config.seed, 'files', split, 0)
      order = rng.permutation(len(splits[split]))
      splits[split] = [splits[split][i] for i in order]
    self._splits = splits
    self.num_problems: int | None = len(splits['train'])
    self.num_validation_problems: int | None = len(splits['validation'])

  def problem(self, index: int, *, split: task.Split) -> task.Problem:
    problems = self._splits[split]
    task.check_index(index, len(problems), split=split)
    return problems[index]


class Gsm8kTask(FileTask):
  """Grade-school word problems, from the JSON lines of their authors.

  Source: Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems,
    arXiv:2110.14168.
  """

  name: str = 'gsm8k'
  reward: str = f'{__name__}:gsm8k_reward'

  def __init__(self, config: task.TaskConfig):
    super().__init__(config, _gsm8k_problem)


class JsonlTask(FileTask):
  """JSON lines with `prompt`, `answer` and, if wanted, `worked`."""

  name: str = 'jsonl'
  reward: str = f'{__name__}:last_line_reward'

  def __init__(self, config: task.TaskConfig):
    super().__init__(config, _jsonl_problem)


def gsm8k_reward(
  prompts: Sequence[str],
  completions: Sequence[str],
  *,
  answer: Sequence[str],
  **columns: Sequence[object],
) -> task.Rewards:
  """Rewards the right number behind the last '####'; None without a number."""
  del prompts, columns
  return answers.score(completions, answer, _is_right_number)


def last_line_reward(
  prompts: Sequence[str],
  completions: Sequence[str],
  *,
  answer: Sequence[str],
  **columns: Sequence[object],
) -> task.Rewards:
  """Rewards a last line that is the answer; None for an empty completion."""
  del prompts, columns
  return answers.score(completions, answer, _is_right_line)


def _is_right_number(completion: str, answer: str) -> bool | None:
  found = _final_number(completion)
  return None if found is None else found == decimal.Decimal(answer)


def _final_number(text: str) -> decimal.Decimal | None:
  """Reads the rest of the line behind the last '####'."""
  _, mark, rest = text.rpartition(_GSM8K_MARK)
  line = rest.strip().partition('\n')[0]
  number = _NUMBER.fullmatch(_IGNORED.sub('', line))
  return decimal.Decimal(number[1]) if mark and number else None


def _is_right_line(completion: str, answer: str) -> bool | None:
  return _last_line(completion) == answer if completion.strip() else None


def _last_line(text: str) -> str:
  return text.strip().rpartition('\n')[2].strip()


def _gsm8k_problem(record: _Record) -> task.Problem:
  solution = _text(record, 'answer')
  number = _final_number(solution)
  if number is None:
    raise ValueError(f"key 'answer' must end in '{_GSM8K_MARK} NUMBER'")
  return task.Problem(
    prompt=f'{_text(record, "question")}\n',
    answer=str(number),
    worked=_CALCULATION.sub('', solution).strip(),
  )


def _jsonl_problem(record: _Record) -> task.Problem:
  answer = _text(record, 'answer').strip()
  if not answer or '\n' in answer:
    raise ValueError(f"key 'answer' must be one line, found {answer!r}")
  worked = _text(record, 'worked') if 'worked' in record else None
  if worked is not None and _last_line(worked) != answer:
    raise ValueError(
      f"key 'worked' must end in the line {answer!r} of 'answer', found "
      f'{_last_line(worked)!r}'
    )
  return task.Problem(_text(record, 'prompt'), answer, worked)


def _text(record: _Record, key: str) -> str:
  value = record.get(key)
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f'key {key!r} must be text, found {value!r}')
  # JSON escapes may leave lone surrogates, which no tokenizer takes.
  value.encode()
  return value


def _read(
  name: str, to_problem: Callable[[_Record], task.Problem]
) -> list[task.Problem]:
  problems = []
  for number, line in _lines(name):
    try:
      record = json.loads(line)
      if not isinstance(record, dict):
        raise ValueError(f'must be a JSON object, found {record!r}')
      problems.append(to_problem(record))
    # What the decoders raise is a ValueError too.
    except (ValueError, RecursionError) as error:
      reason = ' '.join(str(error).split())
      raise ValueError(
        f'{name!r} line {number}: {reason}; mend or remove the line.'
      ) from error
  if not problems:
    raise ValueError(
      f'{name!r} must hold at least one problem, found none; set task.path.'
    )
  return problems


def _lines(name: str) -> Iterator[tuple[int, bytes]]:
  """Yields the lines that are not blank, and their numbers from 1."""
  try:
    with pathlib.Path(name).open('rb') as lines:
      for number, line in enumerate(lines, start=1):
        if line.strip():
          yield number, line
  except OSError as error:
    raise ValueError(
      f'{name!r} must be a readable file: {error.strerror}; set task.path.'
    ) from error
