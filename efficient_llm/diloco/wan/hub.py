"""READ FIRST. The hub of a run of islands, without any network.

It owns the shared parameters, the outer momentum, every fragment's version, who
takes part, and what of whose data counts. Islands come and go as they like: a
message of one comes in by `receive`, what it is to be told is `next_message`,
and `tick` closes rounds as time goes by. One round at a time is open, for one
fragment; rounds follow each other, fragment after fragment.

Over 300 lines: the conversation is one state machine, read in one place.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from absl import logging

from efficient_llm.diloco import screening
from efficient_llm.diloco.wan import config as config_lib
from efficient_llm.diloco.wan import (
  fragment_codec,
  members,
  messages,
  rounds,
  shared_model,
)
from efficient_llm.diloco.wan.config import IslandsConfig
from efficient_llm.diloco.wan.members import Member, Update
from efficient_llm.training import checkpoint as checkpoint_lib
from efficient_llm.training import results, strict_json

_SPAN_KINDS = ('compute', 'waiting', 'sending')
_MAX_SPANS = 1000
_MAX_SECS = 1e18
_HISTORY_KEPT, _REFUSALS_KEPT = 2000, 200
_COUNTS = ('rounds', 'reopened', 'late', 'refused', 'digest_mismatches')


class StoppedError(ValueError):
  """The run cannot go on, in one line."""


class Hub:
  """The state of a run and the rules by which it changes.

  Args:
    config: The run.
    workdir: Its folder: checkpoints, and a line for every round.
    clock: Gives seconds.
  """

  def __init__(
    self,
    config: IslandsConfig,
    workdir: pathlib.Path,
    *,
    clock: Callable[[], float],
  ):
    self._config, self._workdir, self._clock = config, workdir, clock
    theta_P = shared_model.cut(config, shared_model.initial_params(config))
    self.shared = shared_model.SharedModel(config, theta_P)
    self._up = fragment_codec.Codec(config.compression, self.shared.shapes_P)
    self._wanted = {
      'config': config_lib.fingerprint(config),
      'layout': shared_model.layout(theta_P),
      'params': json.dumps([fragment_codec.digest(x) for x in theta_P]),
    }
    self.max_bytes = fragment_codec.max_bytes(theta_P)
    self.members: dict[str, Member] = {}
    self.slot = 0
    self.refusals: list[dict[str, Any]] = []
    self.history: list[dict[str, Any]] = []
    self.counts = dict.fromkeys(_COUNTS, 0)
    self._arrivals: list[Update] = []
    self._arrived: dict[str, float] = {}
    self._pending_P: list[list[Update]] = [[] for _ in theta_P]
    self._started = clock()
    # When the round was; not known of the first, nor of that of a restart.
    self._opened: float | None = None
    # With it a checkpoint is read as that of any run of training.
    self._metadata = results.metadata_without_data(config)
    self._checkpoints = checkpoint_lib.Checkpointer(
      workdir / 'checkpoints', config.loop.checkpoint
    )
    self._restore()

  @property
  def fragment(self) -> int:
    """Of the round that is open."""
    return self.slot % self._config.fragments.count

  @property
  def is_done(self) -> bool:
    """Whether all rounds have closed."""
    return self.slot >= self._config.num_slots

  @property
  def num_slots(self) -> int:
    """Rounds of the whole run."""
    return self._config.num_slots

  @property
  def secs(self) -> float:
    """Since this hub started."""
    return self._clock() - self._started

  @property
  def started(self) -> float:
    """When it did, on its clock."""
    return self._started

  @property
  def tokens(self) -> float:
    """Trained on and counted, by all islands."""
    return sum(member.tokens for member in self.members.values())

  def close(self) -> None:
    """Saves where the run stands and waits for it."""
    self._save(always=True)
    self._checkpoints.close()

  # What islands say.

  def appeared(self, name: str) -> None:
    """An island's link is up, again or for the first time: it is greeted."""
    member = self.members.get(name)
    if member is None:
      member = Member(name, len(self.shared.versions_P))
      self.members[name] = member
    if member.phase != 'expelled':
      member.phase = 'new'
    member.last_seen = self._clock()

  def vanished(self, name: str) -> None:
    """An island's link is down: no round waits for it."""
    member = self.members.get(name)
    if member is not None:
      member.is_present = False
      if member.phase != 'expelled':
        member.phase = 'gone'

  def receive(self, name: str, frame: bytes) -> None:
    """Takes what an island answered, whatever it is.

    Args:
      name: The island, by its key.
      frame: What came.

    Raises:
      StoppedError: If its shared parameters are not the hub's and the run is to
        stop then.
    """
    member = self.members.get(name)
    if member is None or member.phase in ('expelled', 'gone'):
      return
    member.last_seen = self._clock()
    member.bytes_up += len(frame)
    try:
      message = messages.decode(frame, max_bytes=self.max_bytes)
      self._take(member, message)
    except messages.MessageError as error:
      member.phase = 'answered'
      self._refuse(member, str(error))

  def _take(self, member: Member, message: messages.Message) -> None:
    if message.kind == 'bye':
      member.phase, member.is_present = 'gone', False
      return
    if message.kind == 'hello':
      self._take_hello(member, message)
      return
    if message.kind not in ('update', 'alive'):
      raise messages.MessageError(
        f'kind {message.kind[:20]!r} must be hello, update, alive or bye.'
      )
    if message.text('session') != member.session or not member.session:
      # A word of a process that is no more, or was never welcomed.
      member.phase = 'new'
      return
    if self._is_replayed(member, message):
      member.phase = 'answered'
      return
    self._take_signs(member, message)
    self._check_digests(member, message)
    if member.phase == 'expelled':
      return
    member.phase = 'answered'
    if message.kind == 'update':
      member.is_present = True
      self._take_update(member, message)

  def _take_hello(self, member: Member, message: messages.Message) -> None:
    said = {
      'config': message.text('config'),
      'layout': message.text('layout'),
      'params': json.dumps(
        message.texts('params', len(self.shared.versions_P))
      ),
    }
    for what, name in (
      ('layout', 'model'),
      ('config', 'configuration'),
      ('params', 'initial parameters'),
    ):
      if said[what] != self._wanted[what]:
        member.phase, member.is_present = 'expelled', False
        member.note = (
          f"its {name} are not the hub's: start it with the hub's --config and "
          'version'
        )
        logging.warning('Island %s turned away: %s.', member.name, member.note)
        return
    # All is read before anything is changed.
    count = len(self.shared.versions_P)
    session, number = message.text('session'), message.integer('number')
    digests = message.texts('digests', count)
    firsts = message.integers('firsts', count)
    is_back = message.integer('rounds', high=1 << 40) > 0
    sent = None
    if message.fields.get('sent') is not None:
      sent = message.integers('sent', 2)
    is_known = session == member.session
    if is_known and self._is_replayed(member, message):
      member.phase = 'new'
      return
    self._take_signs(member, message)
    member.session, member.number = session, number
    member.versions_P = [
      self.shared.find(p, digest) for p, digest in enumerate(digests)
    ]
    if not is_back:
      is_founder = self.slot == 0 and not any(member.committed_P)
      member.is_new_P = [not is_founder] * count
    elif not is_known:
      # The hub is new, the island is not.
      member.is_new_P = [False] * count
    ends = list(firsts)
    answers = None
    if sent is not None and sent[0] < count:
      fragment, last = sent
      if last == member.committed_P[fragment] > 0:
        # Only the answer was lost.
        answers, ends[fragment] = fragment, last
      else:
        # It still has in its parameters what it sent, and will send it again.
        self._withdraw(member.name, fragment, last)
    # One that only lost its link has trained on, and owes what it has.
    may_go_on = is_back and all(
      version >= 0 and end >= committed
      for version, end, committed in zip(
        member.versions_P, ends, member.committed_P, strict=True
      )
    )
    member.phase = 'answered' if may_go_on else 'hello'
    member.fragment_sent = answers if may_go_on else None
    member.is_present = True

  def _is_replayed(self, member: Member, message: messages.Message) -> bool:
    """Whether a message came before; what it stands in for is not lost."""
    number = message.integer('number')
    if number <= member.number:
      self._note_refusal(member, f'its message {number} is replayed')
      return True
    member.number = number
    return False

  def _withdraw(self, name: str, fragment: int, last: int) -> None:
    """Forgets an island's update that no round has merged."""

    def others(updates: list[Update]) -> list[Update]:
      return [
        x
        for x in updates
        if (x.island, x.fragment, x.last) != (name, fragment, last)
      ]

    self._arrivals = others(self._arrivals)
    self._pending_P = [others(updates) for updates in self._pending_P]
    if name not in {x.island for x in self._arrivals}:
      self._arrived.pop(name, None)

  def _position(self, member: Member) -> int:
    """Batch of an island's data from which nothing counts, or may yet."""
    waiting = [*self._arrivals, *(x for part in self._pending_P for x in part)]
    ends = [x.last for x in waiting if x.island == member.name]
    return max([member.position, *ends])

  def _take_signs(self, member: Member, message: messages.Message) -> None:
    """What an island says of itself."""
    member.steps = message.integer('step')
    if message.fields.get('loss') is not None:
      member.loss = message.number('loss')
    if message.fields.get('speed') is not None:
      member.speed = message.number('speed') or None
    spans = message.fields.get('spans', [])
    shift = self._clock() - message.number('clock')
    if not isinstance(spans, list) or len(spans) > _MAX_SPANS:
      raise messages.MessageError(f'spans must be at most {_MAX_SPANS}.')
    taken = []
    for span in spans:
      if (
        not isinstance(span, list)
        or len(span) != 3
        or span[0] not in _SPAN_KINDS
        or not all(
          type(x) in (int, float) and -_MAX_SECS < x < _MAX_SECS
          for x in span[1:]
        )
      ):
        raise messages.MessageError('a span must be a kind and two times.')
      taken.append((span[0], span[1] + shift, span[2] + shift))
    member.add_spans(taken)

  def _check_digests(self, member: Member, message: messages.Message) -> None:
    count = len(self.shared.versions_P)
    versions = message.integers('versions', count)
    digests = message.texts('digests', count)
    for p in range(count):
      known = self.shared.digests_P[p].get(versions[p])
      if known is None or known == digests[p]:
        member.versions_P[p] = versions[p] if known else -1
        continue
      self.counts['digest_mismatches'] += 1
      line = (
        f'fragment {p} of island {member.name} differs from that of the hub at '
        f'version {versions[p]}'
      )
      if self._config.rounds.on_mismatch == 'stop':
        raise StoppedError(f'{line}; see its machine, or expel it.')
      self._expel(member, line)

  def _take_update(self, member: Member, message: messages.Message) -> None:
    fragment = message.integer('fragment', high=len(self._pending_P) - 1)
    base = message.integer('base')
    late_by = self.shared.versions_P[fragment] - base
    if late_by < 0:
      raise messages.MessageError(
        f'base={base} must be at most {self.shared.versions_P[fragment]}.'
      )
    steps = message.integer('steps')
    first, last = message.integer('first'), message.integer('last')
    tokens = message.number('tokens')
    if not first <= last or (tokens > 0 and not steps):
      raise messages.MessageError(
        f'{first=}, {last=}, {steps=}, {tokens=} must agree.'
      )
    if first < member.committed_P[fragment]:
      member.must_adopt = True
      raise messages.MessageError(
        f'its data from batch {first} on is counted up to '
        f'{member.committed_P[fragment]}: replayed.'
      )
    delta = self._up.decode(message.arrays, fragment)
    for known in [*self._arrivals, *self._pending_P[fragment]]:
      is_own = (known.island, known.fragment) == (member.name, fragment)
      if is_own and known.last > first:
        # Of a process that was thought to be no more.
        self._withdraw(member.name, fragment, known.last)
    member.fragment_sent, member.slot_sent = fragment, -1
    if late_by > self._config.rounds.max_late_rounds or (
      late_by and self._config.rounds.late == 'drop'
    ):
      self.counts['late'] += 1
      self._note_refusal(member, f'late by {late_by} rounds')
      return
    weight = tokens
    if member.is_new_P[fragment] and steps < self._period(member):
      weight = 0.0
    update = Update(
      island=member.name,
      fragment=fragment,
      base=base,
      tokens=tokens,
      steps=steps,
      first=first,
      last=last,
      delta=delta,
      weight=weight,
      is_late=late_by > 0,
    )
    self.counts['late'] += late_by > 0
    if self.is_done:
      return
    if fragment != self.fragment:
      self._pending_P[fragment].append(update)
      return
    self._arrivals.append(update)
    self._arrived[member.name] = self._clock()
    if late_by == 0:
      member.phase, member.slot_sent = 'sent', self.slot

  # What islands are told.

  def next_message(self, name: str) -> bytes | None:
    """What an island is told now; None if it has to wait for it.

    Args:
      name: An island whose last message, if any, is answered.
    """
    member = self.members[name]
    if member.phase == 'new':
      return self._say(member, 'greet', {})
    if member.phase == 'expelled':
      frame = self._say(member, 'refuse', {'reason': member.note})
      member.phase = 'expelled'
      return frame
    if member.phase == 'gone' or member.phase == 'asked':
      return None
    if self.is_done:
      frame = self._go(member, 'stop')
      member.is_present = False
      return frame
    if member.phase == 'sent' and member.slot_sent == self.slot:
      return None
    if member.phase == 'hello':
      return self._go(member, 'welcome')
    return self._go(member, 'go')

  def _go(self, member: Member, kind: str) -> bytes:
    """Tells an island what to do next, and gives it what it has asked for."""
    wanted = []
    if kind == 'welcome' or kind == 'stop' or member.must_adopt:
      wanted = [
        p
        for p, version in enumerate(self.shared.versions_P)
        if member.versions_P[p] != version or member.must_adopt
      ]
    elif member.fragment_sent is not None:
      wanted = [member.fragment_sent]
    if kind == 'welcome' or member.fragment_sent is not None:
      member.steps_told = self._steps_left(member)
      member.slot_told = self.slot
    elif member.slot_told != self.slot:
      member.steps_told = self._steps(member)
      member.slot_told = self.slot
    parts, arrays = [], {}
    for p in wanted:
      known = -1 if member.must_adopt else member.versions_P[p]
      part, found = self.shared.part(p, known)
      parts.append(part)
      arrays |= found
    fields = {
      'session': member.session,
      'slot': self.slot,
      'fragment': self.fragment,
      'steps': member.steps_told,
      'step': self._config.slot_step(self.slot),
      'parts': parts,
      'position': self._position(member),
      'adopt': member.must_adopt,
      'note': member.note if member.must_adopt else '',
    }
    member.fragment_sent, member.must_adopt = None, False
    return self._say(member, kind, fields, arrays)

  def _say(
    self,
    member: Member,
    kind: str,
    fields: dict[str, Any],
    arrays: dict[str, Any] | None = None,
  ) -> bytes:
    frame = messages.encode(
      messages.Message(
        kind, {'run': str(self._workdir), **fields}, arrays or {}
      )
    )
    member.phase = 'asked'
    member.bytes_down += len(frame)
    return frame

  def _steps(self, member: Member) -> int:
    """Steps of an island in the open round, fewer for a slow one."""
    start = self._config.slot_step(self.slot)
    steps = self._config.slot_step(self.slot + 1) - start
    return max(1, int(steps * self._share(member) + 1e-9))

  def _steps_left(self, member: Member) -> int:
    """Fewer for one that begins late, so that it is done with the others."""
    steps = self._steps(member)
    # One that was refused begins its steps again.
    is_in_time = member.slot_sent == self.slot - 1 and not member.must_adopt
    if is_in_time or self._opened is None or member.speed is None:
      return steps
    gone = int((self._clock() - self._opened) * member.speed)
    return max(1, steps - gone)

  def _period(self, member: Member) -> int:
    """Steps of an island in a full period."""
    return max(1, int(self._config.sync_period * self._share(member) + 1e-9))

  def _share(self, member: Member) -> float:
    """Speed of an island, as a share of the fastest one's."""
    speeds = [
      x.speed for x in self.members.values() if x.is_present and x.speed
    ]
    if not (self._config.rounds.match_speeds and member.speed and speeds):
      return 1.0
    return min(1.0, member.speed / max(speeds))

  # Rounds.

  def tick(self) -> bool:
    """Closes the open round if it is time; says whether it did."""
    if self.is_done:
      return False
    found = rounds.closing(
      self._config.rounds,
      arrived=self._arrived,
      present=[x.name for x in self.members.values() if x.is_present],
      now=self._clock(),
    )
    return found is not None and self._close_round(found)

  def silent(self) -> list[str]:
    """Islands that were told something and have not answered for long."""
    patience = self._config.rounds.patience_secs
    return [
      member.name
      for member in self.members.values()
      if member.phase == 'asked' and self._clock() - member.last_seen > patience
    ]

  def _close_round(self, found: rounds.Closing) -> bool:
    """Merges what came; says whether the round closed."""
    fragment = self.fragment
    # In the order of names, so that sums have the same bits again.
    updates = sorted(self._arrivals, key=lambda x: (x.island, x.first))
    merged = self.shared.merge(
      fragment,
      [update.delta for update in updates],
      [update.weight for update in updates],
      shared_seen(self.members, updates),
    )
    for name in found.missing:
      # Waited for in vain once: not again, until it is heard of.
      self.members[name].is_present = False
    for update in updates:
      self.members[update.island].is_new_P[fragment] = False
    if merged.moved is None:
      self._reopen(updates, merged.verdict)
      return False
    lines = []
    for m, update in enumerate(updates):
      member = self.members[update.island]
      code = self._judge(member, fragment, merged.verdict, m)
      if not code:
        member.refused_in_a_row = 0
        self._count(member, update)
      lines.append(
        {
          'island': update.island,
          'first': update.first,
          'last': update.last,
          'tokens': update.tokens,
          'steps': update.steps,
          'weight': 0.0 if code else update.weight,
          'late': update.is_late,
          'verdict': screening.REASONS[code],
          'norm': float(merged.verdict.norms_M[m]),
          'cosine': float(merged.verdict.cosines_M[m]),
        }
      )
    self.counts['rounds'] += 1
    self._record(
      {
        'slot': self.slot,
        'fragment': fragment,
        'version': self.shared.versions_P[fragment],
        'digest': self.shared.digest(fragment),
        'closed_by': found.reason,
        'missing': list(found.missing),
        'moved': merged.moved,
        'secs': self.secs,
        'updates': lines,
      }
    )
    losses = [x.loss for x in self.members.values() if x.is_present and x.loss]
    point = {
      'round': self.slot,
      'secs': self.secs,
      'tokens': self.tokens,
      'loss': sum(losses) / len(losses) if losses else None,
      'islands': len(self._arrived),
    }
    self.history = [*self.history, point][-_HISTORY_KEPT:]
    self.slot += 1
    self._opened = self._clock()
    self._arrivals, self._arrived = [], {}
    if not self.is_done:
      late = self._pending_P[self.fragment]
      self._pending_P[self.fragment] = []
      version = self.shared.versions_P[self.fragment]
      for update in late:
        if version - update.base <= self._config.rounds.max_late_rounds:
          update.is_late = True
          self._arrivals.append(update)
    self._save()
    return True

  def _reopen(self, updates: list[Update], verdict: screening.Verdict) -> None:
    """Nothing that came counts: all train on, and the round waits for it."""
    self._arrivals, self._arrived = [], {}
    self._opened = self._clock()
    self.counts['reopened'] += 1
    self._record({'reopened': self.slot, 'secs': self.secs})
    for m, update in enumerate(updates):
      member = self.members[update.island]
      member.slot_sent = -1
      if verdict.codes_M[m]:
        self._judge(member, update.fragment, verdict, m)

  def _judge(
    self, member: Member, fragment: int, verdict: screening.Verdict, m: int
  ) -> int:
    """Remembers an update and refuses a bad one; gives the reason's number."""
    member.remember(fragment, int(verdict.prints_M[m]))
    code = int(verdict.codes_M[m])
    if code:
      member.must_adopt = True
      self._refuse(member, f'its update is {screening.REASONS[code]}')
    return code

  def _count(self, member: Member, update: Update) -> None:
    """What the mean holds is counted, and its data never again."""
    member.committed_P[update.fragment] = max(
      member.committed_P[update.fragment], update.last
    )
    if update.weight > 0:
      member.tokens += update.tokens / len(self._pending_P)

  def _refuse(self, member: Member, reason: str) -> None:
    self._note_refusal(member, reason)
    member.refused_in_a_row += 1
    limit = self._config.rounds.expel_after
    if limit is not None and member.refused_in_a_row >= limit:
      self._expel(member, f'refused {limit} times in a row, last as {reason}')

  def _note_refusal(self, member: Member, reason: str) -> None:
    reason = ' '.join(reason.split())[:200]
    member.refused += 1
    member.note = reason
    self.counts['refused'] += 1
    refusal = {
      'island': member.name,
      'reason': reason,
      'secs': self.secs,
    }
    self.refusals = [*self.refusals, refusal][-_REFUSALS_KEPT:]
    self._record({'refused': refusal})
    logging.warning('Island %s refused: %s', member.name, reason)

  def _expel(self, member: Member, reason: str) -> None:
    member.phase, member.is_present, member.note = 'expelled', False, reason
    logging.warning('Island %s expelled: %s', member.name, reason)

  # What outlives the process.

  def _record(self, line: dict[str, Any]) -> None:
    with (self._workdir / 'rounds.jsonl').open('a', encoding='utf-8') as file:
      file.write(strict_json.to_json(line) + '\n')

  def _save(self, *, always: bool = False) -> None:
    every = self._config.loop.checkpoint.every_steps
    step = self._config.slot_step(self.slot)
    before = self._config.slot_step(max(self.slot - 1, 0))
    if not always and step // every == before // every:
      return
    saved = {x.name: x.to_json() for x in self.members.values()}
    self._checkpoints.save(
      self.slot,
      self.shared.tree(),
      data_state=None,
      metadata={
        'slot': self.slot,
        'versions': self.shared.versions_P,
        'members': saved,
        'counts': self.counts,
        'digests': self.shared.digests_P,
        'fingerprint': self._wanted['config'],
        **self._metadata,
      },
    )

  def _restore(self) -> None:
    found = self._checkpoints.restore(self.shared.tree())
    if found is None:
      return
    if found.metadata['fingerprint'] != self._wanted['config']:
      raise ValueError(
        f'--workdir={self._workdir} holds a run of another configuration; use '
        'the same --config or another folder.'
      )
    self.shared.restore(
      found.state, found.metadata['versions'], found.metadata['digests']
    )
    self.slot = int(found.metadata['slot'])
    self.counts |= found.metadata['counts']
    count = len(self.shared.versions_P)
    for name, saved in found.metadata['members'].items():
      self.members[name] = members.from_json(name, count, saved)
    self._record({'restored': self.slot})
    logging.info('The hub goes on at round %d.', self.slot)


def shared_seen(known: dict[str, Member], updates: list[Update]) -> Any:
  """Fingerprints of what the senders of updates sent before, uint32 [M, R]."""
  return [known[x.island].seen_R(x.fragment) for x in updates]
