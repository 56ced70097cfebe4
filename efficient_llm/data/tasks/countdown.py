"""Countdown: make a target from given numbers with + - * and /.

Any right expression counts, and any of the numbers may be left out.
"""

import ast
import collections
import fractions
import json
import operator
import re
from collections.abc import Sequence

import numpy as np

from efficient_llm.data.tasks import answers, task

_LARGEST_NUMBER = 50
_LARGEST_TARGET = 999
_MAX_MISSES = 12
_MEAN_MISSES = 2.0
_OPERATORS = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
}
# Short enough that neither parsing nor evaluation can go deep.
_EXPRESSION = re.compile(r'[0-9+*/() -]{1,120}')


class CountdownTask:
  """Numbers and a target made from them, without end."""

  name: str = 'countdown'
  reward: str = f'{__name__}:reward'
  words: tuple[str, ...] | None = None
  num_problems: int | None = None
  num_validation_problems: int | None = None

  def __init__(self, config: task.TaskConfig):
    self._config = config

  def problem(self, index: int, *, split: task.Split) -> task.Problem:
    rng = task.generator(self._config.seed, self.name, split, index)
    prompt, (numbers, target, solution) = task.draw(
      rng, self._draw, split=split
    )
    answer = json.dumps({'numbers': numbers, 'target': target})
    worked = _search(rng, numbers, target, solution)
    return task.Problem(prompt, answer, worked)

  def _draw(
    self, rng: np.random.Generator
  ) -> tuple[str, tuple[list[int], int, str]] | None:
    count = int(rng.integers(2, self._config.max_numbers + 1))
    numbers = rng.integers(1, _LARGEST_NUMBER + 1, count).tolist()
    solution, target = _combine(rng, numbers)
    if target > _LARGEST_TARGET or target in numbers:
      return None
    listed = ' '.join(map(str, numbers))
    prompt = (
      f'Make {target} from the numbers {listed}, each at most once, '
      'with + - * / and brackets.\n'
    )
    return prompt, (numbers, target, solution)


def reward(
  prompts: Sequence[str],
  completions: Sequence[str],
  *,
  answer: Sequence[str],
  **columns: Sequence[object],
) -> task.Rewards:
  """Rewards an expression behind the last 'answer:' that makes the target."""
  del prompts, columns
  return answers.score(completions, answer, _is_right)


def _is_right(completion: str, answer: str) -> bool | None:
  text = answers.final(completion)
  if not text or not _EXPRESSION.fullmatch(text):
    return None
  try:
    tree = ast.parse(text, mode='eval').body
  except SyntaxError:
    return None
  if not _is_arithmetic(tree):
    return None
  problem = json.loads(answer)
  used = collections.Counter(
    node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
  )
  if not used <= collections.Counter(problem['numbers']):
    return False
  try:
    return _value(tree) == problem['target']
  except ZeroDivisionError:
    return False


def _is_arithmetic(node: ast.expr) -> bool:
  """Says whether an expression has nothing but integers and four operators."""
  if isinstance(node, ast.BinOp):
    return (
      type(node.op) in _OPERATORS
      and _is_arithmetic(node.left)
      and _is_arithmetic(node.right)
    )
  return isinstance(node, ast.Constant) and type(node.value) is int


def _value(node: ast.expr) -> fractions.Fraction:
  """Evaluates what `_is_arithmetic` lets pass, exactly."""
  if isinstance(node, ast.BinOp):
    apply = _OPERATORS[type(node.op)]
    return apply(_value(node.left), _value(node.right))
  return fractions.Fraction(ast.literal_eval(node))


def _combine(
  rng: np.random.Generator, numbers: Sequence[int]
) -> tuple[str, int]:
  """Joins all numbers by random operators that keep to positive integers."""
  terms = [(str(number), number) for number in numbers]
  while len(terms) > 1:
    rng.shuffle(terms)
    (left, a), (right, b) = terms.pop(), terms.pop()
    results = {'+': a + b, '*': a * b}
    if a > b:
      results['-'] = a - b
    if a % b == 0:
      results['/'] = a // b
    sign = list(results)[int(rng.integers(len(results)))]
    terms.append((f'({left} {sign} {right})', results[sign]))
  text, value = terms[0]
  return text[1:-1], value


def _search(
  rng: np.random.Generator,
  numbers: Sequence[int],
  target: int,
  solution: str,
) -> str:
  """Writes a few random attempts down, then the one that makes the target."""
  num_misses = task.truncated_geometric(
    rng, smallest=0, largest=_MAX_MISSES, mean_excess=_MEAN_MISSES
  )
  lines = []
  for _ in range(num_misses):
    attempt, value = _combine(rng, numbers)
    if value == target:
      solution = attempt
      break
    lines.append(f'{attempt} = {value}, no')
  lines += [f'{solution} = {target}, yes', f'{answers.MARK} {solution}']
  return '\n'.join(lines)
