"""Rewards from a user's function, in worker processes with a time limit.

A reward function is plain Python: (prompts, completions, **columns) -> a list
with a number for each completion, None where it holds no answer. If it raises,
hangs or ends its process, one line says so, and no row gets a reward for it.
"""

import collections
import dataclasses
import math
import pickle
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, Literal, Self

import numpy as np

from efficient_llm.tlt import reward_worker

# Small: a row that hangs costs its chunk's time.
_MAX_CHUNK_ROWS = 16
_CHUNKS_PER_WORKER = 4
# A row of a failed chunk gets at least this part of the chunk's time.
_MAX_LIMIT_DIVISOR = 4


class RewardError(RuntimeError):
  """A reward function failed; the message is one line."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """Which function gives the rewards, and how it is run.

  Attributes:
    function: 'module:function' or 'path/to/file.py:function'; None stands for
      the task's own, which the caller fills in.
    num_workers: Processes that compute rewards.
    timeout_secs: Time limit of one call, which gets at most 16 rows.
    on_failure: 'stop' raises RewardError; 'drop' marks the rows as failed.
  """

  function: str | None = None
  num_workers: int = 2
  timeout_secs: float = 30.0
  on_failure: Literal['stop', 'drop'] = 'stop'

  def validate(self) -> None:
    function, on_failure = self.function, self.on_failure
    if function is not None and not all(function.rpartition(':')):
      raise ValueError(
        f'reward.{function=} must be module:function or file.py:function.'
      )
    num_workers, timeout_secs = self.num_workers, self.timeout_secs
    if num_workers < 1:
      raise ValueError(f'reward.{num_workers=} must be at least 1.')
    if not 0 < timeout_secs < math.inf:
      raise ValueError(f'reward.{timeout_secs=} must be positive and finite.')
    if on_failure not in ('stop', 'drop'):
      raise ValueError(f"reward.{on_failure=} must be 'stop' or 'drop'.")


@dataclasses.dataclass(frozen=True)
class Scores:
  """The rewards of a batch of completions, in their order.

  Attributes:
    rewards_N: float64; 0 where unparsable, NaN where failed.
    unparsable_N: Whether the completion holds no answer to judge.
    failed_N: Whether the function failed on the row.
    failures: One line each, naming function, rows and what went wrong.
    secs: From submission to the last reward.
  """

  rewards_N: np.ndarray
  unparsable_N: np.ndarray
  failed_N: np.ndarray
  failures: tuple[str, ...]
  secs: float


class RewardPool:
  """Worker processes that run one reward function; a context manager.

  Workers end with the parent, however that ends. A function runs in a worker's
  main thread, so one that sets itself an alarm works.
  """

  def __init__(self, config: RewardConfig):
    """Starts the workers and waits until one has loaded the function.

    Raises:
      ValueError: If there is no such function, in one line.
    """
    config.validate()
    if config.function is None:
      raise ValueError('reward.function=None; write module:function.')
    self._config = config
    self._workers = reward_worker.Workers(config.function, config.num_workers)
    self._lock = threading.Lock()
    self._chunks: collections.deque[_Chunk] = collections.deque()
    self._end: Exception | None = None
    self._is_closing = False
    self._loaded: futures.Future[None] = futures.Future()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()
    try:
      self._loaded.result()
    # Ctrl-C as well: nobody else could close the pool yet.
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def submit(
    self,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    *,
    timeout_secs: float | None = None,
  ) -> futures.Future[Scores]:
    """Has rewards computed while the caller goes on.

    Args:
      prompts: One text for each row.
      completions: As many texts.
      columns: By name, as many values; they are pickled.
      timeout_secs: Of one call, in place of the configuration's.
    Returns:
      A future; with 'stop' its result() raises RewardError at a failure.
    Raises:
      ValueError: If the lengths differ.
      RewardError: If the pool is closed or its workers no longer start.
    """
    num_rows = len(completions)
    columns = dict(prompts=prompts, completions=completions, **columns)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
      raise ValueError(f'{lengths=} must be equal; give each row a value.')
    config = self._config
    if timeout_secs is not None:
      config = dataclasses.replace(config, timeout_secs=timeout_secs)
      config.validate()
    request = _Request(config, num_rows)
    num_parts = _CHUNKS_PER_WORKER * config.num_workers
    size = min(max(num_rows // num_parts, 1), _MAX_CHUNK_ROWS)
    chunks = []
    for first in range(0, num_rows, size):
      part = slice(first, first + size)
      values = {name: list(column[part]) for name, column in columns.items()}
      payload, rows = pickle.dumps(values), range(num_rows)[part]
      chunks.append(_Chunk(request, rows, payload, config.timeout_secs))
    with self._lock:
      if self._end:
        raise RewardError(str(self._end)) from self._end
      self._chunks += chunks
    self._workers.wake()
    return request.future

  def score(
    self,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
  ) -> Scores:
    """Submits and waits."""
    return self.submit(prompts, completions, columns).result()

  def close(self) -> None:
    """Ends the workers; what they still had to do fails. Idempotent."""
    self._is_closing = True
    self._workers.wake()
    self._thread.join()

  def _run(self) -> None:
    """Keeps the workers busy until the pool is closed; a thread of its own."""
    end: Exception = RewardError('The pool is closed; score before that.')
    try:
      while not self._is_closing:
        self._assign()
        for chunk, reply in self._workers.wait():
          self._take(chunk, *reply)
        if self._workers.are_loaded and not self._loaded.done():
          self._loaded.set_result(None)
    # Whatever it is, those who wait for rewards must hear of it.
    except Exception as error:
      end = error
    self._workers.close()
    with self._lock:
      self._end = end
    if not self._loaded.done():
      self._loaded.set_exception(end)
    for chunk in [*self._workers.calls, *self._chunks]:
      chunk.request.stop(RewardError(str(end)))

  def _assign(self) -> None:
    """Gives chunks that somebody still waits for to the idle workers."""
    with self._lock:
      while self._chunks:
        chunk = self._chunks[0]
        if not chunk.request.future.done() and not self._workers.begin(
          chunk, (chunk.payload, chunk.only), timeout_secs=chunk.timeout_secs
        ):
          break
        self._chunks.popleft()

  def _take(self, chunk: '_Chunk', kind: str, value: Any) -> None:
    """Enters what became of a chunk, or has its rows tried one by one."""
    request, rows = chunk.request, chunk.rows
    # A wrong count is the function's fault: alone a row could pass by luck.
    can_retry = kind != 'miscounted' and len(rows) > 1
    if kind == 'scored':
      for row, outcome in zip(rows, value, strict=True):
        request.enter(range(row, row + 1), outcome)
    elif can_retry and self._config.on_failure == 'drop':
      request.retried.append((rows, value))
      with self._lock:
        self._chunks.extendleft(reversed(chunk.one_by_one()))
    else:
      request.enter(rows, value)


@dataclasses.dataclass(frozen=True)
class _Chunk:
  """Rows of a request for one call; `only` one of those in the payload."""

  request: '_Request'
  rows: range
  payload: bytes
  timeout_secs: float
  only: int | None = None

  def one_by_one(self) -> list['_Chunk']:
    limit = self.timeout_secs / min(len(self.rows), _MAX_LIMIT_DIVISOR)
    return [
      _Chunk(self.request, range(row, row + 1), self.payload, limit, only)
      for only, row in enumerate(self.rows)
    ]


class _Request:
  """The rewards of one submission as they come in."""

  def __init__(self, config: RewardConfig, num_rows: int):
    self.future: futures.Future[Scores] = futures.Future()
    # From now on it cannot be cancelled.
    self.future.set_running_or_notify_cancel()
    self._config = config
    self._began = time.monotonic()
    self._outcomes: list[float | str | None] = [None] * num_rows
    self._num_left = num_rows
    self._failures: list[tuple[int, str]] = []
    self.retried: list[tuple[range, str]] = []
    self._finish_if_complete()

  def enter(self, rows: range, outcome: float | str | None) -> None:
    """Enters a reward, None or a fault for some rows."""
    if isinstance(outcome, str):
      line = self._line(rows, outcome)
      self._failures.append((rows.start, line))
      if self._config.on_failure == 'stop':
        remedy = "correct it, or set reward.on_failure to 'drop'."
        self.stop(RewardError(f'{line}; {remedy}'))
    self._outcomes[rows.start : rows.stop] = [outcome] * len(rows)
    self._num_left -= len(rows)
    self._finish_if_complete()

  def stop(self, error: Exception) -> None:
    if not self.future.done():
      self.future.set_exception(error)

  def _line(self, rows: range, fault: str) -> str:
    more = f's {rows[0]} to {rows[-1]}' if len(rows) > 1 else f' {rows[0]}'
    return f'{self._config.function} on row{more} {fault}'

  def _finish_if_complete(self) -> None:
    if self._num_left or self.future.done():
      return
    has_failed = [isinstance(outcome, str) for outcome in self._outcomes]
    for rows, fault in self.retried:
      if not any(has_failed[rows.start : rows.stop]):
        line = self._line(rows, f'{fault}, but each row alone passed')
        self._failures.append((rows.start, line))
    rewards = [math.nan if isinstance(o, str) else o for o in self._outcomes]
    scores = Scores(
      rewards_N=np.array([reward or 0.0 for reward in rewards]),
      unparsable_N=np.array([reward is None for reward in rewards], bool),
      failed_N=np.array(has_failed, bool),
      failures=tuple(line for _, line in sorted(self._failures)),
      secs=time.monotonic() - self._began,
    )
    self.future.set_result(scores)
