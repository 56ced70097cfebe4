"""Flower's own programs, as a hub or an island starts them.

    python -m efficient_llm.diloco.wan.flower_process superlink FLAGS...
    python -m efficient_llm.diloco.wan.flower_process supernode OWN ASK FLAGS...
    python -m efficient_llm.diloco.wan.flower_process start KEYS PORT TASK

Around Flower's they put three things. A SuperLink serves the interfaces that
start programs on the port that islands call: here only the islands' one is open
to other machines, and no request may be larger than Flower's own. A SuperNode
starts a process for every message, with the app that the SuperLink sends: here
it asks the trainer itself, runs nothing that was sent, and asks the hub for
messages every ASK seconds. And both end when who started them does.
"""

import functools
import hashlib
import os
import pathlib
import signal
import sys
import threading
import time
import types
from collections.abc import Sequence
from typing import Any

import httpx
from flwr.app import Error, Message
from flwr.cli import build
from flwr.common import serde
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto import control_pb2, runtime_pb2
from flwr.supercore import fab as fab_lib
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.heartbeat import (
  HeartbeatSender,
  make_task_heartbeat_fn_http,
)
from flwr.supercore.interceptors import (
  RuntimeTokenHttpInterceptor,
  RuntimeVersionHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode
from flwr.supernode.runtime import run_clientapp
from starlette.middleware import Middleware

from efficient_llm.diloco.wan import flower_frames, keys, shim

APP = pathlib.Path(__file__).parent / 'app'
_FLEET = '/v1/fleet/'
_LOOPBACK = ('127.0.0.1', '::1')
# Flower cuts arrays into chunks of 5 MiB.
_MAX_REQUEST_BYTES = 16 << 20
_READY_SECS = 120.0
_TASK_POLL_SECS = 0.1
# How often a SuperNode asks by itself.
_ASK_SECS = 3.0


class Gate:
  """Keeps all but the islands' interface on this machine, and requests small.

  Args:
    app: What is behind it.
  """

  def __init__(self, app: Any):
    self._app = app

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Answers an ASGI request, or hands it on."""
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    host = (scope.get('client') or ('',))[0]
    if not scope['path'].startswith(_FLEET) and host not in _LOOPBACK:
      await _refuse(send, 403)
      return
    length = dict(scope['headers']).get(b'content-length', b'0')
    if not length.isdigit() or int(length) > _MAX_REQUEST_BYTES:
      print(f'Refused a request of {length!r} bytes from {host}.', flush=True)
      await _refuse(send, 413)
      return
    taken = 0

    async def bounded() -> Any:
      nonlocal taken
      event = await receive()
      taken += len(event.get('body', b''))
      if taken > _MAX_REQUEST_BYTES:
        print(f'Refused a request without end from {host}.', flush=True)
        return {'type': 'http.disconnect'}
      return event

    await self._app(scope, bounded, send)


async def _refuse(send: Any, status: int) -> None:
  await send({'type': 'http.response.start', 'status': status, 'headers': []})
  await send({'type': 'http.response.body', 'body': b''})


def main(arguments: Sequence[str]) -> None:
  """Runs one of the programs."""
  which, *rest = arguments
  if which == 'start':
    _start(pathlib.Path(rest[0]), port=int(rest[1]), task=rest[2])
    return
  threading.Thread(target=_end_with_parent, daemon=True).start()
  sys.argv = [f'flower-{which}', *rest]
  if which == 'superlink':
    extensions.get_middleware = lambda: (Middleware(Gate),)
    flower_superlink()
  elif which == 'supernode':
    address, ask_secs, *flags = rest
    sys.argv[1:] = [*flags, '--isolation=process']
    pause = functools.partial(_pause, float(ask_secs))
    # It has no setting for it.
    start_client_internal.__dict__['time'] = types.SimpleNamespace(sleep=pause)
    for module in (start_client_internal, run_clientapp):
      flower_frames.fetch_promptly(module)
    threading.Thread(target=_work, args=(address,), daemon=True).start()
    flower_supernode()
  else:
    raise ValueError(f'{which!r} must be superlink, supernode or start.')


def _pause(longest: float, secs: float) -> None:
  """Flower's pauses between two questions, which are of 3 s and shorter."""
  time.sleep(longest if secs >= _ASK_SECS else min(longest, secs))


def _work(address: str) -> None:
  """Answers the hub's messages, one after the other, for as long as it lives.

  Args:
    address: HOST:PORT of this SuperNode's interface for programs.
  """
  with _runtime_client(address, []) as client:
    while True:
      found = client.AcquireTask(
        runtime_pb2.AcquireTaskRequest(
          supported_task_types=[TaskType.CLIENT_APP]
        )
      )
      if not (found.HasField('task') and found.token):
        time.sleep(_TASK_POLL_SECS)
        continue
      try:
        _answer(address, found.token)
      except Exception as error:
        # The hub asks again; the island must not fall silent for it.
        print(f'A message was not answered: {error!r}', flush=True)


def _answer(address: str, token: str) -> None:
  """Hands one message to the trainer, and what it says back to Flower."""
  with _runtime_client(address, [RuntimeTokenHttpInterceptor(token)]) as client:
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    try:
      message, context, _, _ = run_clientapp.pull_task_input(client)
      try:
        reply = shim.exchange(message, context)
      except OSError as error:
        reply = Message(
          Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)),
          reply_to=message,
        )
      run_clientapp.push_message(client, reply, context)
      run_clientapp.push_task_output(client, context, SubStatus.COMPLETED, '')
    finally:
      heartbeat.stop()


def _runtime_client(
  address: str, interceptors: Sequence[Any]
) -> RuntimeHttpClient:
  return RuntimeHttpClient.from_server_address(
    server_address=address,
    insecure=True,
    root_certificates=None,
    interceptors=[
      RuntimeVersionHttpInterceptor(component_name='flwr-clientapp'),
      *interceptors,
    ],
    retry_invoker=make_simple_http_retry_invoker(),
  )


def _end_with_parent() -> None:
  """Takes leave when the parent is gone, and goes in any case."""
  parent = os.getppid()
  while os.getppid() == parent:
    time.sleep(0.3)
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(5)
  os._exit(1)


def _start(folder: pathlib.Path, *, port: int, task: str) -> None:
  """Tells a SuperLink which islands there are, and starts the run."""
  client = ControlHttpClient.from_server_address(
    server_address=f'127.0.0.1:{port}',
    insecure=False,
    root_certificates=(folder / keys.AUTHORITY).read_bytes(),
    interceptors=[RuntimeVersionHttpInterceptor(component_name='flwr CLI')],
  )
  with client:
    _wait_until_ready(client)
    for name, path in keys.allowed(folder).items():
      client.RegisterNode(
        control_pb2.RegisterNodeRequest(
          public_key=keys.public_bytes(path), name=name
        )
      )
    content = build.build_fab_from_disk(APP)
    fab = fab_lib.Fab(hashlib.sha256(content).hexdigest(), content, {})
    client.StartRun(
      control_pb2.StartRunRequest(
        fab=serde.fab_to_proto(fab),
        override_config=serde.user_config_to_proto({'run': task}),
      )
    )


def _wait_until_ready(client: ControlHttpClient) -> None:
  end = time.monotonic() + _READY_SECS
  while True:
    try:
      client.ListNodes(control_pb2.ListNodesRequest())
      return
    except httpx.TransportError:
      if time.monotonic() > end:
        raise
      time.sleep(0.3)


if __name__ == '__main__':
  main(sys.argv[1:])
