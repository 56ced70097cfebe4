"""The hitting-time trace: how long a number wanders before it falls below 10.

A prompt gives x from 10 to 99, and d and e from 1 to 99. From v = x on, v
becomes v + d if it is even and v + e if it is odd, modulo 100, until it is
below 10. The completion writes every step out, as in

  v 7 8 even so add d 2 6 ; 8 + 6 = 1 4 , 7 + 2 + 1 = 1 0 ; v 0 4 done

the ones first, then the tens with the carry, whose hundreds digit is dropped.
The number of steps cannot be read from the prompt and has a long tail. Every
digit is a word, so what is easy or hard does not hang on a tokenizer.

The whole trace counts, not the value it ends at: there are only ten of those,
and a model rewarded for them learns to guess and stops writing.
"""

from collections.abc import Sequence

import numpy as np

from efficient_llm.data.tasks import answers, task

_STOP_BELOW = 10
_DONE = 'done'
_SIGNS = ('=', '+', ';', ',')
_WORDS = ('x', 'd', 'e', 'v', 'even', 'odd', 'so', 'add', _DONE)
# x, d and e.
_Numbers = tuple[int, int, int]


class TraceTask:
  """Hitting-time traces, without end."""

  name: str = 'trace'
  reward: str = f'{__name__}:reward'
  words: tuple[str, ...] | None = (*'0123456789', *_SIGNS, *_WORDS)
  num_problems: int | None = None
  num_validation_problems: int | None = None

  def __init__(self, config: task.TaskConfig):
    self._config = config

  def problem(self, index: int, *, split: task.Split) -> task.Problem:
    rng = task.generator(self._config.seed, self.name, split, index)
    prompt, (numbers, answer) = task.draw(rng, self._draw, split=split)
    worked = answer
    if split == 'train' and self._config.slip:
      worked = self._with_slips(rng, numbers)
    return task.Problem(prompt, answer, worked)

  def _draw(
    self, rng: np.random.Generator
  ) -> tuple[str, tuple[_Numbers, str]] | None:
    x, d, e = (int(rng.integers(smallest, 100)) for smallest in (10, 1, 1))
    answer = _trace((x, d, e), max_steps=self._config.max_steps)
    if answer is None:
      return None
    prompt = f'x {_spell(x)} d {_spell(d)} e {_spell(e)} ='
    return prompt, ((x, d, e), answer)

  def _with_slips(self, rng: np.random.Generator, numbers: _Numbers) -> str:
    """Draws slips until the trace they lead to is not too long either."""
    while True:
      worked = _trace(
        numbers,
        max_steps=self._config.max_steps,
        slip=self._config.slip,
        rng=rng,
      )
      if worked is not None:
        return worked


def reward(
  prompts: Sequence[str],
  completions: Sequence[str],
  *,
  answer: Sequence[str],
  **columns: Sequence[object],
) -> task.Rewards:
  """Rewards a trace that is right word for word; None if it does not end."""
  del prompts, columns
  return answers.score(completions, answer, _is_right)


def _is_right(completion: str, answer: str) -> bool | None:
  words = completion.split()
  return words == answer.split() if words[-1:] == [_DONE] else None


def _trace(
  numbers: _Numbers,
  *,
  max_steps: int,
  slip: float = 0.0,
  rng: np.random.Generator | None = None,
) -> str | None:
  """Writes a trace out, None if it takes more than `max_steps`."""
  value, *addends = numbers
  steps = []
  while value >= _STOP_BELOW:
    if len(steps) == max_steps:
      return None
    is_odd = value % 2
    addend = addends[is_odd]
    slips = [0, 0]
    if rng is not None and rng.random() < slip:
      # Adding 1 to 9 modulo 10 gives every other digit.
      slips[int(rng.integers(2))] = int(rng.integers(1, 10))
    rule = 'odd so add e' if is_odd else 'even so add d'
    sums, result = _add(value, addend, slips)
    steps.append(f'v {_spell(value)} {rule} {_spell(addend)} ; {sums} ;')
    value = result
  return ' '.join([*steps, f'v {_spell(value)} {_DONE}'])


def _add(value: int, addend: int, slips: Sequence[int]) -> tuple[str, int]:
  """Writes a sum out; `slips` is added to the ones and to the tens written."""
  tens, ones = divmod(value, 10)
  more_tens, more_ones = divmod(addend, 10)
  carry, low = divmod(ones + more_ones, 10)
  low = (low + slips[0]) % 10
  hundreds, high = divmod(tens + more_tens + carry, 10)
  high = (high + slips[1]) % 10
  sums = (
    f'{ones} + {more_ones} = {carry} {low} , '
    f'{tens} + {more_tens} + {carry} = {hundreds} {high}'
  )
  return sums, 10 * high + low


def _spell(number: int) -> str:
  return f'{number // 10} {number % 10}'
