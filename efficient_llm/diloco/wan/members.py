"""What the hub knows of an island, and what it has counted of it."""

import dataclasses
from typing import Any, Literal

import numpy as np

from efficient_llm.diloco.state import PRINTS_KEPT
from efficient_llm.diloco.wan.fragment_codec import Fragment

# Where the conversation with an island stands: what it is to be told next.
Phase = Literal[
  'new',  # greeted next
  'asked',  # told something; its answer is awaited
  'hello',  # welcomed next
  'sent',  # its update waits for the round to close
  'answered',  # told to go on next
  'expelled',  # told to go next
  'gone',  # left, or was told to
]
_SPANS_KEPT = 400


@dataclasses.dataclass
class Update:
  """An island's update of a fragment, decoded but not judged.

  Attributes:
    island: Its name.
    fragment: Of the model.
    base: Version it was measured from.
    tokens: Trained on for it.
    steps: Made for it.
    first: First batch of the island's data that it holds.
    last: The batch after the last one.
    delta: What the shared parameters were less the island's.
    weight: Of it in the mean.
    is_late: Whether its round had closed.
  """

  island: str
  fragment: int
  base: int
  tokens: float
  steps: int
  first: int
  last: int
  delta: Fragment
  weight: float
  is_late: bool


@dataclasses.dataclass
class Member:
  """An island as the hub knows it.

  Attributes:
    name: It is called so by its key.
    num_fragments: Of the model.
    phase: What it is told next.
    session: The island's process; another one begins with the shared state.
    number: Of the last message of that process; one that comes again is told
      by it.
    is_present: Whether rounds wait for it.
    slot_sent: Round to which its update came in time.
    fragment_sent: Of its last update, if it has not been answered.
    slot_told: Round for which it was last told to make steps.
    steps_told: How many, from one update to the next.
    versions_P: Of the shared fragments it has; -1 for none.
    is_new_P: Whether it has yet to train a full period of a fragment.
    committed_P: Batches of its data that count in each fragment.
    prints_P: Fingerprints of its last updates.
    tokens: That count, once for all fragments together.
    steps: It reported to have made.
    speed: Steps a second while it computes; None if not known.
    refused: Updates so far, and in a row.
    note: What was last wrong with it.
    spans: (kind, start, end) in seconds of the hub's clock.
  """

  name: str
  num_fragments: int
  phase: Phase = 'new'
  session: str = ''
  number: int = 0
  is_present: bool = False
  slot_sent: int = -1
  slot_told: int = -1
  steps_told: int = 1
  fragment_sent: int | None = None
  versions_P: list[int] = dataclasses.field(default_factory=list)
  is_new_P: list[bool] = dataclasses.field(default_factory=list)
  committed_P: list[int] = dataclasses.field(default_factory=list)
  prints_P: list[list[int]] = dataclasses.field(default_factory=list)
  tokens: float = 0.0
  steps: int = 0
  speed: float | None = None
  loss: float | None = None
  last_seen: float = 0.0
  refused: int = 0
  refused_in_a_row: int = 0
  note: str = ''
  must_adopt: bool = False
  bytes_up: int = 0
  bytes_down: int = 0
  spans: list[tuple[str, float, float]] = dataclasses.field(
    default_factory=list
  )

  def __post_init__(self) -> None:
    count = self.num_fragments
    self.versions_P = self.versions_P or [-1] * count
    self.is_new_P = self.is_new_P or [True] * count
    self.committed_P = self.committed_P or [0] * count
    self.prints_P = self.prints_P or [[] for _ in range(count)]

  @property
  def position(self) -> int:
    """Batch of its data from which nothing counts yet in any fragment."""
    return max(self.committed_P)

  def seen_R(self, fragment: int) -> np.ndarray:
    """Fingerprints of its last updates of a fragment, 0 for none."""
    found = np.zeros(PRINTS_KEPT, np.uint32)
    prints = self.prints_P[fragment][-PRINTS_KEPT:]
    found[: len(prints)] = prints
    return found

  def remember(self, fragment: int, fingerprint: int) -> None:
    """Keeps the fingerprint of an update that was judged."""
    kept = [*self.prints_P[fragment], int(fingerprint)]
    self.prints_P[fragment] = kept[-PRINTS_KEPT:]

  def add_spans(self, spans: list[tuple[str, float, float]]) -> None:
    """Keeps what it did when."""
    self.spans = [*self.spans, *spans][-_SPANS_KEPT:]

  def to_json(self) -> dict[str, Any]:
    """What a checkpoint holds of it."""
    return {
      'committed': self.committed_P,
      'prints': self.prints_P,
      'tokens': self.tokens,
      'steps': self.steps,
      'refused': self.refused,
      'expelled': self.note if self.phase == 'expelled' else '',
      'bytes_up': self.bytes_up,
      'bytes_down': self.bytes_down,
    }


def from_json(name: str, num_fragments: int, saved: dict[str, Any]) -> Member:
  """An island as a checkpoint knows it: one that is not there yet."""
  return Member(
    name,
    num_fragments,
    phase='expelled' if saved['expelled'] else 'new',
    committed_P=list(saved['committed']),
    prints_P=[list(x) for x in saved['prints']],
    tokens=saved['tokens'],
    steps=saved['steps'],
    refused=saved['refused'],
    note=saved['expelled'],
    bytes_up=saved['bytes_up'],
    bytes_down=saved['bytes_down'],
  )
