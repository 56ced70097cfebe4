"""Hub and islands in one process, joined by threads instead of a network."""

import dataclasses
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

from efficient_llm.data import pipeline
from efficient_llm.diloco.wan import config as config_lib
from efficient_llm.diloco.wan import hub as hub_lib
from efficient_llm.diloco.wan import island as island_lib
from efficient_llm.diloco.wan.config import IslandsConfig
from tests import tiny


def config(text: pathlib.Path, **changes: Any) -> IslandsConfig:
  """Two islands, twelve steps, a sync every three; else as `tiny.config`."""
  plain = tiny.config(text, **changes.pop('loop', {}))
  fields = {
    field.name: getattr(plain, field.name)
    for field in dataclasses.fields(plain)
  }
  rounds = config_lib.RoundConfig(
    grace_secs=5.0, deadline_secs=20.0, patience_secs=20.0, poll_secs=5.0
  )
  return IslandsConfig(
    **{**fields, 'islands': 2, 'sync_period': 3, 'rounds': rounds, **changes}
  )


class DirectLink:
  """Both ends of a link; what goes over it may be changed or lost.

  Args:
    island: Whose link it is.
    change: Gets what the island says; gives what arrives, None for nothing.
  """

  def __init__(
    self,
    island: island_lib.Island,
    change: Callable[[bytes], bytes | None] = lambda frame: frame,
  ):
    self._island, self._change = island, change
    self._event = threading.Condition()
    self._order: bytes | None = None
    self._answer: bytes | None = None
    self._is_open = False

  def poll(self, secs: float = 0.0) -> bytes | None:
    with self._event:
      if self._order is None and secs:
        self._event.wait(secs)
      order, self._order = self._order, None
      return order

  def claim(self) -> bool:
    return self._is_open

  def answer(self, frame: bytes) -> None:
    with self._event:
      self._answer, self._is_open = frame, False
      self._event.notify_all()

  def ask(self, frame: bytes, stop: threading.Event) -> bytes | None:
    """The hub's end."""
    with self._event:
      self._order, self._is_open = frame, True
      self._event.notify_all()
      while self._answer is None and not stop.is_set():
        self._event.wait(0.05)
      answer, self._answer = self._answer, None
    return None if answer is None else self._change(answer)


def run(
  hub: hub_lib.Hub,
  islands: dict[str, tuple[island_lib.Island, DirectLink]],
  *,
  secs: float = 400.0,
) -> dict[str, island_lib.Outcome]:
  """Runs islands against a hub until it has told all of them to stop."""
  outcomes: dict[str, island_lib.Outcome] = {}
  stop, lock = threading.Event(), threading.Lock()
  failures: list[BaseException] = []

  def train(name: str) -> None:
    try:
      island, link = islands[name]
      outcomes[name] = island.run(link)
    except BaseException as error:
      failures.append(error)

  def converse(name: str) -> None:
    link = islands[name][1]
    with lock:
      hub.appeared(name)
    while not stop.is_set() and name not in outcomes:
      with lock:
        frame = hub.next_message(name)
      if frame is None:
        time.sleep(0.01)
        continue
      answer = link.ask(frame, stop)
      if answer is not None:
        with lock:
          hub.receive(name, answer)

  threads = [
    threading.Thread(target=work, args=(name,), daemon=True)
    for name in islands
    for work in (train, converse)
  ]
  for thread in threads:
    thread.start()
  end = time.monotonic() + secs
  while len(outcomes) < len(islands) and time.monotonic() < end:
    with lock:
      hub.tick()
    if failures:
      break
    time.sleep(0.01)
  stop.set()
  for thread in threads:
    thread.join(5)
  if failures:
    raise failures[0]
  return outcomes


def batches(
  config: IslandsConfig, cache: pathlib.Path, *, share: tuple[int, int]
) -> Any:
  """An island's share of one text."""
  dataset = pipeline.open_dataset(config.data, split='train', cache_dir=cache)
  return dataset.iterate(island=share)
