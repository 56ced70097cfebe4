"""The state of a run of islands in numbers: what the page and programs read."""

from collections.abc import Sequence
from typing import Any

from efficient_llm.diloco.wan import hub as hub_lib
from efficient_llm.diloco.wan.members import Member


def status(hub: hub_lib.Hub) -> dict[str, Any]:
  """The state of a run, as JSON can hold it.

  Args:
    hub: Of the run.
  """
  history = list(hub.history)
  return {
    'round': hub.slot,
    'rounds': hub.num_slots,
    'secs': hub.secs,
    'tokens': hub.tokens,
    'tokens_per_sec': _rate(history),
    'versions': list(hub.shared.versions_P),
    'digests': [hub.shared.digest(p) for p in range(len(hub.shared.theta_P))],
    'counts': dict(hub.counts),
    'islands': [_island(member) for member in list(hub.members.values())],
    'refusals': list(hub.refusals),
    'history': history,
  }


def _island(member: Member) -> dict[str, Any]:
  spans = list(member.spans)
  return {
    'name': member.name,
    'state': _state(member),
    'steps': member.steps,
    'tokens': member.tokens,
    'loss': member.loss,
    'steps_per_sec': member.speed,
    'utilisation': utilisation(spans),
    'versions': list(member.versions_P),
    'bytes_up': member.bytes_up,
    'bytes_down': member.bytes_down,
    'refused': member.refused,
    'note': member.note,
    'spans': [list(span) for span in spans],
  }


def utilisation(spans: Sequence[tuple[str, float, float]]) -> float | None:
  """Share of the time that an island computed; None before it did.

  Args:
    spans: (kind, start, end) in seconds.
  """
  own = [span for span in spans if span[0] != 'sending']
  if not own:
    return None
  whole = max(x[2] for x in own) - min(x[1] for x in own)
  busy = sum(end - start for kind, start, end in own if kind == 'compute')
  return min(1.0, busy / whole) if whole > 0 else None


def _state(member: Member) -> str:
  if member.phase == 'expelled':
    return 'expelled'
  if member.phase == 'gone':
    return 'away'
  if not member.is_present:
    return 'not waited for'
  return 'waiting for the round' if member.phase == 'sent' else 'training'


def _rate(history: Sequence[dict[str, Any]]) -> float | None:
  """Counted tokens a second over the last rounds."""
  last = history[-20:]
  if len(last) < 2 or last[-1]['secs'] <= last[0]['secs']:
    return None
  return (last[-1]['tokens'] - last[0]['tokens']) / (
    last[-1]['secs'] - last[0]['secs']
  )
