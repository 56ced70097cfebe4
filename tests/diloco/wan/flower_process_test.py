import asyncio
from typing import Any

import pytest

_REASON = 'needs the extra [wan]'
pytest.importorskip('flwr', reason=_REASON)
flower_process: Any = pytest.importorskip(
  'efficient_llm.diloco.wan.flower_process', reason=_REASON
)


def _status(
  path: str,
  *,
  host: str = '203.0.113.5',
  length: int | None = 3,
  body: bytes = b'abc',
) -> int | None:
  """What the gate answers; 200 if it lets the request through."""
  answers: list[int] = []
  bodies = [body[:2], body[2:]]

  async def app(scope: Any, receive: Any, send: Any) -> None:
    del scope
    while bodies:
      event = await receive()
      if event['type'] == 'http.disconnect':
        return
    await send({'type': 'http.response.start', 'status': 200, 'headers': []})

  async def receive() -> Any:
    part = bodies.pop(0)
    return {'type': 'http.request', 'body': part, 'more_body': bool(bodies)}

  async def send(event: Any) -> None:
    if event['type'] == 'http.response.start':
      answers.append(event['status'])

  headers = []
  if length is not None:
    headers = [(b'content-length', str(length).encode())]
  scope = {
    'type': 'http',
    'path': path,
    'client': (host, 1),
    'headers': headers,
  }
  asyncio.run(flower_process.Gate(app)(scope, receive, send))
  return answers[0] if answers else None


def test_islands_are_let_through() -> None:
  assert _status('/v1/fleet/pull-messages') == 200


@pytest.mark.parametrize(
  'path', ['/v1/control/start-run', '/v1/runtime/x', '/']
)
def test_what_starts_programs_is_for_this_machine_only(path: str) -> None:
  assert _status(path) == 403
  assert _status(path, host='127.0.0.1') == 200


def test_a_request_that_is_too_large_is_refused_unread() -> None:
  assert _status('/v1/fleet/push-object', length=(16 << 20) + 1) == 413


def test_a_request_that_does_not_say_how_large_it_is_is_cut_off() -> None:
  body = bytes((16 << 20) + 1)
  assert _status('/v1/fleet/push-object', length=None, body=body) is None
