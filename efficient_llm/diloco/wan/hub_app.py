"""The hub as a Flower ServerApp: whose turn it is, and what went astray.

One message at a time is under way to each island. Flower tells which islands
have a link; what they say and are told is up to `hub`. Flower waits for the
whole of an answer that has begun to come, so each is fetched in a thread: an
island with a slow link, or one that dies while it sends, holds up nobody else.
"""

import contextlib
import dataclasses
import logging as std_logging
import os
import pathlib
import pickle
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
from absl import logging
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.superlink.grid import http_grid

from efficient_llm.diloco.wan import flower_frames, status, status_page
from efficient_llm.diloco.wan import hub as hub_lib
from efficient_llm.diloco.wan.config import IslandsConfig
from efficient_llm.training import strict_json

app = ServerApp()
_PAUSE_SECS = 0.1
_NODES_EVERY_SECS = 1.0
# Islands of which it is asked at once whether they have answered.
_FETCHED_AT_ONCE = 4
# How long islands have to take leave at the end.
_LEAVE_SECS = 60.0
_TRAIN = 'train'


@dataclasses.dataclass(frozen=True)
class Task:
  """What a hub process is to do.

  Attributes:
    config: The run.
    workdir: Its folder.
    page: HOST:PORT of the status page; None for none.
    launch: Where it says that it began and how it ended: a folder of its own,
      as a hub that was killed may end after the next one has begun.
  """

  config: IslandsConfig
  workdir: pathlib.Path
  page: str | None
  launch: pathlib.Path


@app.main()
def main(grid: Grid, context: Context) -> None:
  """Runs the hub of the task that the launcher wrote down."""
  path = pathlib.Path(str(context.run_config['run']))
  # Written by the launcher, which is the same user.
  task: Task = pickle.loads(path.read_bytes())
  _log_to(task.workdir / 'hub.log')
  # In one step: who reads it must not find it empty.
  strict_json.write_atomically(task.launch / 'process.txt', str(os.getpid()))
  hub: hub_lib.Hub | None = None
  ending: dict[str, Any] = {'state': 'failed', 'reason': 'interrupted'}
  try:
    hub = hub_lib.Hub(task.config, task.workdir, clock=time.time)
    with _page(task, hub):
      Conversation(hub, grid).run()
    ending = {'state': 'done'}
  except ValueError as error:
    state = 'refused' if hub is None else 'failed'
    ending = {'state': state, 'reason': ' '.join(str(error).split())}
    raise
  except Exception as error:
    reason = f'{type(error).__name__}: {" ".join(str(error).split())}'
    ending = {'state': 'failed', 'reason': reason}
    raise
  finally:
    if hub is not None:
      hub.close()
      text = strict_json.to_json(status.status(hub), indent=2)
      strict_json.write_atomically(task.workdir / 'status.json', text)
    with contextlib.suppress(FileNotFoundError):
      strict_json.write_atomically(
        task.launch / 'ending.json', strict_json.to_json(ending)
      )


def _log_to(path: pathlib.Path) -> None:
  """Writes what the hub says to a file; Flower shows nothing of its own."""
  handler = std_logging.FileHandler(path)
  handler.setFormatter(
    std_logging.Formatter('%(asctime)s %(message)s', datefmt='%H:%M:%S')
  )
  # What libraries say only if it is a warning.
  handler.addFilter(
    lambda record: (
      record.levelno >= std_logging.WARNING
      or 'efficient_llm' in pathlib.PurePath(record.pathname).parts
    )
  )
  logging.set_verbosity(logging.INFO)
  logging.get_absl_logger().addHandler(handler)


@contextlib.contextmanager
def _page(task: Task, hub: hub_lib.Hub) -> Iterator[None]:
  if task.page is None:
    yield
    return
  with status_page.serving(hub, task.page) as address:
    logging.info('Status page: http://%s/', address)
    yield


class Conversation:
  """Carries messages between the hub and Flower's nodes.

  Args:
    hub: What is said.
    grid: Flower's.
  """

  def __init__(self, hub: hub_lib.Hub, grid: Grid):
    self._hub, self._grid = hub, grid
    self._nodes: dict[int, tuple[str, str]] = {}
    self._asked: dict[str, int] = {}
    self._fetching: set[str] = set()
    self._fetched: queue.SimpleQueue[tuple[str, list[Message]]] = (
      queue.SimpleQueue()
    )
    self._looked = 0.0
    flower_frames.fetch_promptly(http_grid)

  def run(self) -> None:
    """Until the run is done and the islands know."""
    end = None
    while end is None or (time.time() < end and self._nodes):
      self._look_around()
      self._hear()
      while self._hub.tick():
        logging.info(
          'Round %d of the run is done: %.0f tokens',
          self._hub.slot,
          self._hub.tokens,
        )
      self._speak()
      if self._hub.is_done:
        end = end or time.time() + _LEAVE_SECS
        if all(
          x.phase in ('gone', 'expelled') for x in self._hub.members.values()
        ):
          return
      time.sleep(_PAUSE_SECS)

  def _look_around(self) -> None:
    """Which islands have a link, and since when."""
    if time.time() - self._looked < _NODES_EVERY_SECS:
      return
    self._looked = time.time()
    try:
      nodes = list(self._grid.get_nodes())
    except httpx.HTTPError as error:
      logging.warning('Flower failed: %s', error)
      return
    found = {
      node.node_id: (node.name, node.last_activated_at)
      for node in nodes
      if node.name
    }
    for node, (name, since) in list(self._nodes.items()):
      if found.get(node) != (name, since):
        self._drop(node)
        self._hub.vanished(name)
        del self._nodes[node]
    for node, (name, since) in found.items():
      if node not in self._nodes:
        self._nodes[node] = (name, since)
        self._hub.appeared(name)
        logging.info('Island %s is there', name)
    for name in self._hub.silent():
      logging.warning('Island %s has not answered for long', name)
      for node, (other, _) in self._nodes.items():
        if other == name:
          self._drop(node)
      self._hub.vanished(name)
      self._hub.appeared(name)

  def _drop(self, node: int) -> None:
    """Expects no answer of a node any more."""
    self._asked = {
      x: other for x, other in self._asked.items() if other != node
    }

  def _hear(self) -> None:
    quiet = [x for x in self._asked if x not in self._fetching]
    for message_id in quiet[:_FETCHED_AT_ONCE]:
      # It goes to the end: the others are asked before it is again.
      self._asked[message_id] = self._asked.pop(message_id)
      self._fetching.add(message_id)
      threading.Thread(
        target=self._fetch, args=(message_id,), daemon=True
      ).start()
    while not self._fetched.empty():
      message_id, replies = self._fetched.get()
      self._fetching.discard(message_id)
      for reply in replies:
        self._take(reply)

  def _fetch(self, message_id: str) -> None:
    """Fetches the answer to a message, if there is one."""
    replies: list[Message] = []
    try:
      with self._surviving():
        replies = list(self._grid.pull_messages([message_id]))
    finally:
      self._fetched.put((message_id, replies))

  def _take(self, reply: Message) -> None:
    node = self._asked.pop(reply.metadata.reply_to_message_id, None)
    if node is None or node not in self._nodes:
      return
    name = self._nodes[node][0]
    if reply.has_error():
      # Who has ended does not hear that all is done.
      if not self._hub.is_done:
        logging.warning('Island %s: %s', name, reply.error.reason)
      self._hub.appeared(name)
    else:
      self._hub.receive(name, flower_frames.unpack(reply))

  def _speak(self) -> None:
    busy = set(self._asked.values())
    for node, (name, _) in self._nodes.items():
      frame = None if node in busy else self._hub.next_message(name)
      if frame is None:
        continue
      message = Message(flower_frames.pack(frame), node, _TRAIN)
      # One by one, so that one that fails is that island's alone.
      with self._surviving(name):
        for message_id in self._grid.push_messages([message]):
          self._asked[message_id] = node

  @contextlib.contextmanager
  def _surviving(self, name: str | None = None) -> Iterator[None]:
    """Goes on where Flower fails; the island is greeted anew."""
    try:
      yield
    except (ObjectPushError, httpx.HTTPError) as error:
      logging.warning('Flower failed: %s', ' '.join(str(error).split()))
      if name is not None:
        self._hub.appeared(name)
