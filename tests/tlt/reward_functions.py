"""Reward functions for tests, good and bad; workers import this file."""

import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

NOT_A_FUNCTION = 1.0


def is_right(
  prompts: list[str], completions: list[str], *, answer: list[str]
) -> list[float | None]:
  """Compares numbers; None for what is none."""
  del prompts
  return [
    float(completion == right) if completion.isdigit() else None
    for completion, right in zip(completions, answer, strict=True)
  ]


def obey(prompts: list[str], completions: list[str]) -> list[Any]:
  """Does what each completion says."""
  del prompts
  return [_obey(completion) for completion in completions]


def _obey(order: str) -> Any:
  match order.split():
    case ['raise']:
      raise LookupError('no such\nthing')
    case ['hang']:
      time.sleep(600)
    case ['regex']:
      # Holds the interpreter's lock, for longer than anybody waits.
      re.match(r'(a+)+$', 'a' * 60 + 'b')
    case ['leave']:
      sys.exit(0)
    case ['exit']:
      os._exit(3)
    case ['crash']:
      os.kill(os.getpid(), signal.SIGSEGV)
    case ['start']:
      # A process of its own, whose number it gives before it hangs.
      child = subprocess.Popen(['sleep', '600'])
      print(child.pid, file=sys.stderr, flush=True)
      time.sleep(600)
    case ['text']:
      return '1.0'
    case ['slow_pid']:
      time.sleep(0.2)
      return os.getpid()
    case ['pid']:
      return os.getpid()
    case ['print']:
      print('printed by the reward function')
      return 1.0
    case ['sleep', secs]:
      time.sleep(float(secs))
      return 1.0
    case [number]:
      return float(number)
  return None


def is_even(
  prompts: list[str], completions: list[str], *, answer: list[str]
) -> list[float]:
  """Rewards that differ within many groups."""
  del prompts, answer
  return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


def too_few(prompts: list[str], completions: list[str]) -> list[float]:
  """Gives one reward, whatever it is asked."""
  del prompts, completions
  return [1.0]


def nothing(prompts: list[str], completions: list[str]) -> None:
  """Forgets to return."""
  del prompts, completions


def fails_on_several(prompts: list[str], completions: list[str]) -> list[float]:
  """Takes one row at a time only."""
  (prompt,) = prompts
  del prompt, completions
  return [1.0]


def num_characters(
  prompts: list[str], completions: list[str], *, answer: list[str]
) -> list[float]:
  """Gives nearly every answer another reward."""
  del prompts, answer
  return [float(len(completion)) for completion in completions]


def num_heavy_modules(
  prompts: list[str], completions: list[str]
) -> list[float]:
  """Counts what a worker should not have imported."""
  del prompts
  heavy = {'jax', 'numpy', 'efficient_llm'} & set(sys.modules)
  return [float(len(heavy))] * len(completions)
