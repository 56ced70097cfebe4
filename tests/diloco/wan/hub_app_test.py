"""How the hub carries messages, with Flower's side made up."""

import threading
import time
import types
from typing import Any

import pytest

_REASON = 'needs the extra [wan]'
pytest.importorskip('flwr', reason=_REASON)
hub_app: Any = pytest.importorskip(
  'efficient_llm.diloco.wan.hub_app', reason=_REASON
)
flower_frames: Any = pytest.importorskip(
  'efficient_llm.diloco.wan.flower_frames', reason=_REASON
)


def test_an_answer_that_is_slow_to_come_holds_up_no_other() -> None:
  is_there = threading.Event()
  heard: list[tuple[str, bytes]] = []

  def pull_messages(message_ids: list[str]) -> list[Any]:
    # Flower waits for the rest of an answer that has begun to come.
    if message_ids == ['to slow']:
      is_there.wait(30)
    return [
      types.SimpleNamespace(
        metadata=types.SimpleNamespace(reply_to_message_id=message_id),
        has_error=lambda: False,
        content=flower_frames.pack(message_id.encode()),
      )
      for message_id in message_ids
    ]

  conversation = hub_app.Conversation(
    types.SimpleNamespace(receive=lambda *said: heard.append(said)),
    types.SimpleNamespace(pull_messages=pull_messages),
  )
  conversation._nodes = {1: ('slow', 0.0), 2: ('quick', 0.0)}
  conversation._asked = {'to slow': 1, 'to quick': 2}

  def hear(count: int) -> None:
    end = time.monotonic() + 20
    while len(heard) < count and time.monotonic() < end:
      conversation._hear()
      time.sleep(0.01)

  hear(1)
  assert heard == [('quick', b'to quick')]
  is_there.set()
  hear(2)
  assert heard[1:] == [('slow', b'to slow')]
