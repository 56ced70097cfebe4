"""READ FIRST, after `hub`. One island: between two inner steps, the hub.

It never stops to send. With an overlap it trains on until the answer is there;
without one it waits for it, as DiLoCo does, but no longer than
`rounds.patience_secs`.

Over 300 lines: one loop, and all that may interrupt it.
"""

import dataclasses
import threading
import time
from typing import Any, Protocol

from absl import logging

from efficient_llm.diloco.wan import exchange as exchange_lib
from efficient_llm.diloco.wan import shared_model
from efficient_llm.diloco.wan import trainer as trainer_lib
from efficient_llm.diloco.wan.config import IslandsConfig
from efficient_llm.diloco.wan.fragment_codec import Fragment

_MAX_SPANS = 500
_GREETING_SECS = 1.0


class RefusedError(ValueError):
  """The hub does not want this island, in one line."""


class Link(Protocol):
  """How messages of the hub come and are answered; see `local_link`."""

  def poll(self, secs: float = 0.0) -> bytes | None: ...

  def claim(self) -> bool: ...

  def answer(self, frame: bytes) -> None: ...


class Trainer(Protocol):
  """What makes the steps; see `trainer`."""

  @property
  def position(self) -> int: ...

  def begin(self, position: int) -> None: ...

  def step(self, at: int) -> trainer_lib.Step: ...

  def own(self, fragment: int) -> Fragment: ...

  def put(
    self,
    fragment: int,
    values: Fragment,
    *,
    mixing: float,
    since: Fragment | None = None,
  ) -> None: ...


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of an island.

  Attributes:
    steps: Inner steps it made.
    tokens: It trained on.
    rounds: Answers of the hub.
    compute_secs: Spent in steps.
    waiting_secs: Spent waiting for the hub, once it had begun.
    loss: Of the last step, in nats a token.
  """

  steps: int
  tokens: float
  rounds: int
  compute_secs: float
  waiting_secs: float
  loss: float | None


class Island:
  """Trains between the hub's messages.

  Args:
    config: The run.
    trainer: Makes the steps.
    exchange: Its side of the conversation.
  """

  def __init__(
    self,
    config: IslandsConfig,
    trainer: Trainer,
    *,
    exchange: exchange_lib.Exchange | None = None,
  ):
    self._config, self._trainer = config, trainer
    self._exchange = exchange or exchange_lib.Exchange(
      config, shared_model.cut(config, shared_model.initial_params(config))
    )
    self._steps_a_round = config.slot_step(1)
    self._lock = threading.Lock()
    self._spans: list[list[Any]] = []
    self._steps = 0
    # Since the round's first orders.
    self._since_told = 0
    self._has_trained = False
    self._tokens = self._compute_secs = self._waiting_secs = 0.0
    self._speed: float | None = None
    self._loss: float | None = None
    self._rounds = 0
    self._orders: exchange_lib.Orders | None = None
    self._held: exchange_lib.Orders | None = None
    # Its own parameters of the fragment under way.
    self._sent_own: tuple[int, Fragment] | None = None
    self._sent_at = 0.0
    self._is_alone = False

  def idle(self) -> bytes | None:
    """Says that there is nothing to send yet; from any thread."""
    if self._orders is None:
      return None
    with self._lock:
      return self._exchange.alive(self._signs())

  def run(self, link: Link) -> Outcome:
    """Trains until the hub says stop.

    Args:
      link: To the hub.

    Raises:
      RefusedError: If the hub does not want this island.
    """
    self._exchange.compile()
    while not self._is_over(link):
      if self._orders is None:
        continue
      if self._is_due() and self._may_send(link):
        self._send(link)
        self._is_alone = False
      if self._must_wait():
        self._wait(link)
      else:
        self._step()
    return Outcome(
      steps=self._steps,
      tokens=self._tokens,
      rounds=self._rounds,
      compute_secs=self._compute_secs,
      waiting_secs=self._waiting_secs,
      loss=self._loss,
    )

  def _is_over(self, link: Link) -> bool:
    """Obeys the hub's next message, if there is one."""
    secs = 0.0 if self._orders is not None else _GREETING_SECS
    frame = link.poll(secs)
    if frame is not None:
      self._obey(frame, link)
    self._apply_if_due()
    return self._orders is not None and self._orders.kind == 'stop'

  def _obey(self, frame: bytes, link: Link) -> None:
    with self._lock:
      orders = self._exchange.take(frame, position=self._trainer.position)
    if orders.kind == 'refuse':
      raise RefusedError(f'the hub refuses this island: {orders.reason}.')
    if orders.kind == 'greet':
      if link.claim():
        with self._lock:
          link.answer(self._exchange.hello(self._signs()))
      return
    if orders.reason:
      logging.warning('The hub refused an update: %s', orders.reason)
    if self._sent_at:
      self._span('sending', self._sent_at, time.time())
      self._sent_at = 0.0
    if orders.kind == 'stop':
      if link.claim():
        link.answer(self._exchange.bye())
    elif orders.kind == 'welcome' and self._rounds == 0:
      self._begin(orders)
    self._rounds += 1
    if self._held is not None:
      # An answer that came before the last one was applied.
      self._apply(self._held)
    if self._orders is None or orders.step != self._orders.step:
      self._since_told = 0
    self._orders = self._held = orders
    self._is_alone = False

  def _begin(self, orders: exchange_lib.Orders) -> None:
    """Takes up the run where the hub is."""
    self._exchange.begin_at(orders.position)
    # All that the hub has now, and not the parameters of step 0.
    for p, values in enumerate(self._exchange.theta_P):
      self._trainer.put(p, values, mixing=0.0)
    self._trainer.begin(orders.position)
    logging.info(
      'Welcome: step %d, batch %d of the data', orders.step, orders.position
    )

  def _apply_if_due(self) -> None:
    held = self._held
    if held is None:
      return
    overlap = self._config.fragments.overlap_steps
    if held.adopts_all or self._exchange.since_sent >= overlap:
      self._apply(held)
      self._held = None

  def _apply(self, orders: exchange_lib.Orders) -> None:
    sent, self._sent_own = self._sent_own, None
    keeps = self._config.rounds.on_answer == 'keep'
    for p, values in orders.parts:
      if orders.adopts_all:
        self._trainer.put(p, values, mixing=0.0)
      elif keeps and sent is not None and sent[0] == p:
        self._trainer.put(p, values, mixing=1.0, since=sent[1])
      else:
        mixing = self._config.fragments.mixing
        self._trainer.put(p, values, mixing=mixing)

  def _is_due(self) -> bool:
    assert self._orders is not None
    return (
      # An update that is refused again and again must not end all training.
      self._has_trained
      and self._exchange.since_sent >= self._orders.steps
      and not self._exchange.awaits_answer
      and self._held is None
    )

  def _must_wait(self) -> bool:
    """Whether an update has to be answered, or sent, before the next step."""
    if self._config.fragments.overlap_steps or self._is_alone:
      return False
    return self._exchange.awaits_answer or self._is_due()

  def _may_send(self, link: Link) -> bool:
    if link.claim():
      return True
    if self._must_wait():
      self._wait(link)
    return False

  def _wait(self, link: Link) -> None:
    """Waits for the hub, but no longer than is patient."""
    start = time.time()
    patience = self._config.rounds.patience_secs
    frame = None
    while frame is None and time.time() - start < patience:
      frame = link.poll(min(0.2, patience))
    end = time.time()
    self._waiting_secs += end - start
    self._span('waiting', start, end)
    if frame is None:
      logging.warning('No word from the hub for %.0f s: going on.', patience)
      self._is_alone = True
    else:
      self._obey(frame, link)

  def _send(self, link: Link) -> None:
    assert self._orders is not None
    fragment = self._orders.fragment
    own = self._trainer.own(fragment)
    with self._lock:
      frame = self._exchange.update(
        fragment, own, position=self._trainer.position, signs=self._signs()
      )
    self._has_trained = False
    if self._config.rounds.on_answer == 'keep':
      self._sent_own = fragment, own
    self._sent_at = time.time()
    link.answer(frame)

  def _step(self) -> None:
    assert self._orders is not None
    # No further than its round: the learning rate follows the run, and not an
    # island that is slower than others or out of the hub's sight.
    gone = min(self._since_told, self._steps_a_round)
    start = time.time()
    found = self._trainer.step(self._orders.step + gone)
    end = time.time()
    self._steps += 1
    self._since_told += 1
    self._has_trained = True
    self._tokens += found.tokens
    self._compute_secs += end - start
    # The first one compiles.
    if self._steps > 1:
      rate = 1.0 / max(end - start, 1e-6)
      old = self._speed
      self._speed = rate if old is None else 0.8 * old + 0.2 * rate
    self._loss = self._loss if found.loss is None else found.loss
    with self._lock:
      self._exchange.trained(found.tokens)
    self._span('compute', start, end)

  def _span(self, kind: str, start: float, end: float) -> None:
    """Keeps what was done when; steps in a row are one span."""
    with self._lock:
      last = self._spans[-1] if self._spans else None
      if (
        kind == 'compute'
        and last is not None
        and last[0] == 'compute'
        and start - last[2] < 0.05
        and end - last[1] < 60
      ):
        last[2] = end
        return
      self._spans = [*self._spans, [kind, start, end]][-_MAX_SPANS:]

  def _signs(self) -> dict[str, Any]:
    """What the island says of itself; spans are said once."""
    spans, self._spans = self._spans, []
    return {
      'step': self._steps,
      'loss': self._loss,
      'speed': self._speed,
      'spans': spans,
      'clock': time.time(),
    }
