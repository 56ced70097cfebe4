"""Two real processes meet: values, failures, one that is late."""

import pathlib
import re
import subprocess
import sys

import pytest

from efficient_llm.training import processes, rendezvous
from tests import binary
from tests.training import processes_process

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def said() -> list[list[str]]:
  """The lines of each of two processes."""
  port = str(binary.free_port())
  program = [sys.executable, '-m', processes_process.__name__]
  started = [
    subprocess.Popen(
      [*program, str(index), port],
      cwd=_ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  lines = []
  try:
    for process in started:
      output, errors = process.communicate(timeout=120)
      assert process.returncode == 0, errors
      # Gloo writes to the same stream, at times into the middle of a line.
      lines.append(re.findall(r'answer: (.*)', output))
  finally:
    for process in started:
      process.kill()
  return lines


def test_every_process_gets_the_values_of_all(said: list[list[str]]) -> None:
  assert [x[0] for x in said] == ["[{'of': 0}, {'of': 1}]"] * 2


def test_a_device_works_while_its_process_waits(said: list[list[str]]) -> None:
  assert said[0][1] == 'True'


def test_arrays_of_any_size_reach_all(said: list[list[str]]) -> None:
  assert [x[2] for x in said] == ['[[[0, 0, 0], [0, 0, 0]], [1]]'] * 2


def test_the_first_decides_for_all(said: list[list[str]]) -> None:
  assert [x[3] for x in said] == ['0', '0']


def test_what_fails_in_one_process_fails_in_all(said: list[list[str]]) -> None:
  assert [x[4] for x in said] == [
    'ProcessError process 1 failed: LookupError: no such thing',
    'LookupError no such thing',
  ]


def test_a_process_that_is_late_is_named(said: list[list[str]]) -> None:
  assert said[0][5] == (
    'ProcessError process 1 must come within 1 s and did not; see its log.'
  )
  # It comes when the other has left.
  assert said[1][5].startswith('ProcessError process')


def test_one_process_meets_itself() -> None:
  meeting = rendezvous.Rendezvous()
  assert meeting.exchange([1, 'a'], timeout_secs=1.0) == [[1, 'a']]
  assert processes.on_all(lambda: 3, timeout_secs=1.0) == [3]
