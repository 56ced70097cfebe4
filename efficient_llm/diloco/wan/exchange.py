"""An island's side of the conversation, without any network or model.

It keeps the shared parameters as of when it got them (the anchors its updates
are measured from), what it owes (error feedback), and which of its data is in
which update. An update that was lost costs nothing: until it is answered, the
anchor stays, and the next one holds its work too.
"""

import dataclasses
import uuid
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from efficient_llm.diloco.wan import config as config_lib
from efficient_llm.diloco.wan import fragment_codec, messages, shared_model
from efficient_llm.diloco.wan.config import IslandsConfig
from efficient_llm.diloco.wan.fragment_codec import Fragment


@dataclasses.dataclass
class Interval:
  """What an island did since a fragment's anchor.

  Attributes:
    first: First batch of its data.
    steps: Inner steps.
    tokens: Trained on.
  """

  first: int
  steps: int = 0
  tokens: float = 0.0


@dataclasses.dataclass(frozen=True)
class Sent:
  """An update that is not answered yet.

  Attributes:
    fragment: Of the model.
    owed: What the island owed before it.
    interval: What it held.
    last: Batch after its last one.
    steps: Made between the one before it and this one.
  """

  fragment: int
  owed: Fragment | None
  interval: Interval
  last: int
  steps: int


@dataclasses.dataclass(frozen=True)
class Orders:
  """What the hub wants.

  Attributes:
    kind: 'greet', 'welcome', 'go', 'stop' or 'refuse'.
    fragment: To send next.
    steps: To make until then.
    step: Of the fastest island, as the round begins.
    position: Batch of its data to begin with, for one that begins.
    parts: New values of shared fragments.
    adopts_all: Whether these replace all of the island's own.
    reason: Why it is refused, or its last update was.
  """

  kind: str
  fragment: int = 0
  steps: int = 1
  step: int = 0
  position: int = 0
  parts: tuple[tuple[int, Fragment], ...] = ()
  adopts_all: bool = False
  reason: str = ''


class Exchange:
  """What an island knows of the shared parameters and of its own updates.

  Args:
    config: The run.
    theta_P: Initial parameters by fragment.
  """

  def __init__(self, config: IslandsConfig, theta_P: Sequence[Fragment]):
    self._config = config
    self.theta_P = list(theta_P)
    self.versions_P = [0] * len(self.theta_P)
    self.session = uuid.uuid4().hex
    shapes_P = [fragment_codec.shapes_of(x) for x in theta_P]
    self._up = fragment_codec.Codec(config.compression, shapes_P)
    self._down = fragment_codec.Codec(config.down_compression, shapes_P)
    self.max_bytes = fragment_codec.max_bytes(theta_P)
    self._digests_P = [fragment_codec.digest(x) for x in self.theta_P]
    self._params = list(self._digests_P)
    self._owed_P: list[Fragment | None] = [
      jax.tree.map(np.zeros_like, x)
      if config.compression.has_residual
      else None
      for x in self.theta_P
    ]
    self._intervals_P = [Interval(0) for _ in self.theta_P]
    self._sent: Sent | None = None
    self._rounds = self._number = 0
    self._since_sent = 0

  def compile(self) -> None:
    """Compiles what updates and answers need, so that training never waits."""
    self._up.compile_compress()
    self._down.compile_decode()

  @property
  def awaits_answer(self) -> bool:
    """Whether an update is under way."""
    return self._sent is not None

  @property
  def since_sent(self) -> int:
    """Steps since the last update that was not in vain."""
    return self._since_sent

  def trained(self, tokens: float) -> None:
    """Counts an inner step."""
    self._since_sent += 1
    for interval in self._intervals_P:
      interval.steps += 1
      interval.tokens += tokens

  def hello(self, signs: dict[str, Any]) -> bytes:
    """Who this is, and what is under way: it may be counted, or lost.

    Args:
      signs: What the island says of itself.
    """
    self._number += 1
    sent = self._sent
    fields = {
      **signs,
      'session': self.session,
      'number': self._number,
      'config': config_lib.fingerprint(self._config),
      'layout': shared_model.layout(self.theta_P),
      'params': self._params,
      'digests': self._digests_P,
      'rounds': self._rounds,
      'firsts': [interval.first for interval in self._intervals_P],
      'sent': None if sent is None else [sent.fragment, sent.last],
    }
    return messages.encode(messages.Message('hello', fields))

  def alive(self, signs: dict[str, Any]) -> bytes:
    """That there is nothing to send yet."""
    return messages.encode(messages.Message('alive', self._signed(signs)))

  def bye(self) -> bytes:
    """That the island goes."""
    return messages.encode(messages.Message('bye', {}))

  def update(
    self,
    fragment: int,
    own: Fragment,
    *,
    position: int,
    signs: dict[str, Any],
  ) -> bytes:
    """The island's update of a fragment.

    Args:
      fragment: Its number.
      own: The island's parameters.
      position: The batch after the last one that it trained on.
      signs: What the island says of itself.
    """
    interval = self._intervals_P[fragment]
    owed = self._owed_P[fragment]
    delta = {name: x - own[name] for name, x in self.theta_P[fragment].items()}
    arrays, _, new_owed = self._up.compress(delta, owed)
    self._owed_P[fragment] = new_owed
    self._sent = Sent(
      fragment, owed, dataclasses.replace(interval), position, self._since_sent
    )
    self._since_sent = 0
    fields = {
      **self._signed(signs),
      'fragment': fragment,
      'base': self.versions_P[fragment],
      'tokens': interval.tokens,
      'steps': interval.steps,
      'first': interval.first,
      'last': position,
    }
    return messages.encode(messages.Message('update', fields, arrays))

  def take(self, frame: bytes, *, position: int) -> Orders:
    """Takes what the hub says and brings the anchors up to date.

    Args:
      frame: Its message.
      position: The batch after the last one trained on.

    Raises:
      messages.MessageError: If it is not one.
    """
    message = messages.decode(frame, max_bytes=self.max_bytes)
    if message.kind == 'greet':
      return Orders('greet')
    if message.kind == 'refuse':
      return Orders('refuse', reason=message.text('reason'))
    if message.kind not in ('welcome', 'go', 'stop'):
      raise messages.MessageError(f'kind {message.kind[:20]!r} is not known.')
    if message.text('session') != self.session:
      # Said to a process that was here before this one.
      return Orders('stop' if message.kind == 'stop' else 'greet')
    parts = message.fields.get('parts')
    if not isinstance(parts, list) or len(parts) > len(self.theta_P):
      raise messages.MessageError('parts must be at most one per fragment.')
    adopts_all = message.fields.get('adopt') is True
    if message.kind == 'welcome':
      self._take_back()
      self._since_sent = 0
    said = {part.get('fragment') for part in parts if isinstance(part, dict)}
    if self._sent is not None and self._sent.fragment not in said:
      # Not taken: its work is in the next one.
      self._take_back()
    new = []
    for part in parts:
      p, version, values = fragment_codec.unpack_part(
        part, message, theta_P=self.theta_P, codec=self._down
      )
      # If it is not the hub's, the hub sees so from what is said next.
      found = fragment_codec.digest(values)
      self.theta_P[p], self.versions_P[p] = values, version
      self._digests_P[p] = found
      self._begin(p, position, keeps_owed=not adopts_all)
      new.append((p, values))
    self._sent = None
    self._rounds += 1
    if adopts_all:
      self._since_sent = 0
    return Orders(
      kind=message.kind,
      fragment=message.integer('fragment', high=len(self.theta_P) - 1),
      steps=message.integer('steps', low=1),
      step=message.integer('step'),
      position=message.integer('position'),
      parts=tuple(new),
      adopts_all=adopts_all or message.kind == 'welcome',
      reason=message.text('note'),
    )

  def begin_at(self, position: int) -> None:
    """No batch before this one counts, nor will."""
    self._intervals_P = [Interval(position) for _ in self.theta_P]
    self._since_sent = 0

  def _begin(self, fragment: int, position: int, *, keeps_owed: bool) -> None:
    """Measures from a new anchor: what was answered is no longer to be sent."""
    sent = self._sent
    now = self._intervals_P[fragment]
    if sent is not None and sent.fragment == fragment and keeps_owed:
      self._intervals_P[fragment] = Interval(
        sent.last,
        now.steps - sent.interval.steps,
        now.tokens - sent.interval.tokens,
      )
    else:
      self._intervals_P[fragment] = Interval(position)
      keeps_owed = False
    owed = self._owed_P[fragment]
    if owed is not None and not keeps_owed:
      self._owed_P[fragment] = jax.tree.map(np.zeros_like, owed)

  def _take_back(self) -> None:
    """The update under way was never sent."""
    if self._sent is not None:
      self._owed_P[self._sent.fragment] = self._sent.owed
      self._since_sent += self._sent.steps
      self._sent = None

  def _signed(self, signs: dict[str, Any]) -> dict[str, Any]:
    self._number += 1
    return {
      **signs,
      'session': self.session,
      'number': self._number,
      'versions': self.versions_P,
      'digests': self._digests_P,
    }
