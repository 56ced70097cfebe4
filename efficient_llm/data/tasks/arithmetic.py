"""Long addition and multiplication, column by column.

The digits of each number are drawn with chances that fall geometrically, and a
long multiplication takes the product of both, so lengths have a long tail.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from efficient_llm.data.tasks import answers, task

_MEAN_MORE_DIGITS = 1.5


class ArithmeticTask:
  """Sums and products, without end."""

  name: str = 'arithmetic'
  reward: str = f'{__name__}:reward'
  words: tuple[str, ...] | None = None
  num_problems: int | None = None
  num_validation_problems: int | None = None

  def __init__(self, config: task.TaskConfig):
    self._config = config

  def problem(self, index: int, *, split: task.Split) -> task.Problem:
    rng = task.generator(self._config.seed, self.name, split, index)
    prompt, (a, sign, b) = task.draw(rng, self._draw, split=split)
    work = _add if sign == '+' else _multiply
    lines, result = work(a, b)
    worked = '\n'.join([*lines, f'{answers.MARK} {result}'])
    return task.Problem(prompt, str(result), worked)

  def _draw(self, rng: np.random.Generator) -> tuple[str, tuple[int, str, int]]:
    a, b = self._number(rng), self._number(rng)
    sign = '+*'[int(rng.integers(2))]
    return f'Compute {a} {sign} {b}.\n', (a, sign, b)

  def _number(self, rng: np.random.Generator) -> int:
    num_digits = task.truncated_geometric(
      rng,
      smallest=1,
      largest=self._config.max_digits,
      mean_excess=_MEAN_MORE_DIGITS,
    )
    return int(rng.integers(10 ** (num_digits - 1), 10**num_digits))


def reward(
  prompts: Sequence[str],
  completions: Sequence[str],
  *,
  answer: Sequence[str],
  **columns: Sequence[object],
) -> task.Rewards:
  """Rewards the right number behind the last 'answer:'."""
  del prompts, columns
  return answers.score(completions, answer, _is_right)


def _is_right(completion: str, answer: str) -> bool | None:
  found = answers.integers(completion)
  return found == [int(answer)] if found and len(found) == 1 else None


def _add(a: int, b: int) -> tuple[list[str], int]:
  """Adds column by column, ones first, and writes down each."""
  num_columns = max(len(str(a)), len(str(b)))
  pairs = zip(_digits(a, num_columns), _digits(b, num_columns), strict=True)
  lines = _columns((f'{x} + {y}', x + y) for x, y in pairs)
  return [*lines, f'{a} + {b} = {a + b}'], a + b


def _multiply(a: int, b: int) -> tuple[list[str], int]:
  """Multiplies by one digit after the other and adds up as it goes."""
  lines, total = [], 0
  for place, digit in enumerate(_digits(b, len(str(b)))):
    by, part = digit * 10**place, a * digit * 10**place
    lines += _columns(
      (f'{x} * {digit}', x * digit) for x in _digits(a, len(str(a)))
    )
    lines.append(f'{a} * {by} = {part}')
    more, total = _add(total, part) if place else ([], part)
    lines += more
  return lines, total


def _columns(terms: Iterable[tuple[str, int]]) -> list[str]:
  lines, carry = [], 0
  for text, value in terms:
    total = value + carry
    line = f'{text} + {carry} = {total}, write {total % 10}, carry '
    carry = total // 10
    lines.append(f'{line}{carry}')
  return lines


def _digits(number: int, num_digits: int) -> list[int]:
  """Lists the digits from the ones on, with zeros behind the last."""
  return [int(digit) for digit in reversed(str(number).zfill(num_digits))]
