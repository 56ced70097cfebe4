"""All there is to a run of independent islands around a hub."""

import dataclasses
import hashlib
from typing import Any, Literal

from efficient_llm import typing
from efficient_llm.data import tokenizer
from efficient_llm.diloco import compression as compression_lib
from efficient_llm.diloco import fragments as fragments_lib
from efficient_llm.diloco import outer as outer_lib
from efficient_llm.diloco import screening as screening_lib
from efficient_llm.training import pretrain, strict_json

# What may differ from island to island.
_OWN_FIELDS = ('mesh', 'sampling', 'sample_prompts')


@dataclasses.dataclass(frozen=True)
class RoundConfig:
  """When a round closes, and what becomes of an update that comes late.

  A round closes when all islands that are present have sent; or `grace_secs`
  after a `quorum` of them has; or `deadline_secs` after the first one has.

  Attributes:
    quorum: Share of the islands that are present.
    grace_secs: What the others have after the quorum.
    deadline_secs: What the quorum has after the first update.
    late: Whether a late update counts in the fragment's next round, measured
      from what it was measured from, or not at all.
    max_late_rounds: By how many rounds it may be late.
    patience_secs: After so long without a sign of an island the hub greets it
      anew; after so long without one of the hub an island trains on alone.
    poll_secs: After so long an island that has nothing to send says so.
    ask_secs: How often an island asks the hub for a message; what it is told
      comes half of that later on average.
    match_speeds: Slower islands make fewer steps between two updates, so that
      all send about at once.
    on_answer: What an island does with what it has learned of a fragment since
      it sent it: 'keep' adds it to the shared parameters; 'mix' weighs both by
      `fragments.mixing`, as Streaming DiLoCo does.
    expel_after: Refused updates in a row after which an island has to go; None
      for never.
    on_mismatch: Where an island's shared parameters are not those of the hub,
      the run stops, or the island has to go.
  """

  quorum: float = 0.5
  grace_secs: float = 30.0
  deadline_secs: float = 600.0
  late: Literal['rebase', 'drop'] = 'rebase'
  max_late_rounds: int = 1
  patience_secs: float = 120.0
  poll_secs: float = 60.0
  ask_secs: float = 3.0
  match_speeds: bool = True
  on_answer: Literal['keep', 'mix'] = 'keep'
  expel_after: int | None = None
  on_mismatch: Literal['stop', 'expel'] = 'stop'

  def validate(self) -> None:
    """Raises ValueError if a setting breaks a rule, in one line."""
    typing.check_choices(self, name='rounds')
    if not 0 < self.quorum <= 1:
      raise ValueError(
        f'rounds.quorum={self.quorum} must be in (0, 1]; 0.5 is half of the '
        'islands.'
      )
    for name in (
      'grace_secs',
      'deadline_secs',
      'patience_secs',
      'poll_secs',
      'ask_secs',
    ):
      if not 0 < getattr(self, name) < float('inf'):
        raise ValueError(
          f'rounds.{name}={getattr(self, name)} must be positive; it is in '
          'seconds.'
        )
    if self.max_late_rounds < 0:
      raise ValueError(
        f'rounds.max_late_rounds={self.max_late_rounds} must not be negative; '
        '0 takes no late update.'
      )
    if self.expel_after is not None and self.expel_after < 1:
      raise ValueError(
        f'rounds.expel_after={self.expel_after} must be at least 1; none never '
        'expels.'
      )


@dataclasses.dataclass(frozen=True)
class IslandsConfig(pretrain.PretrainConfig):
  """A run of islands; mesh, data.path and batches are an island's own.

  loop.num_steps counts the steps of the fastest island, and
  loop.checkpoint.every_steps those between two checkpoints of the hub.

  Attributes:
    islands: How many are expected; the outer rate recommended for a number of
      islands follows it. Fewer or more may take part.
    sync_period: Steps of the fastest island between two syncs of the same
      parameters.
    compression: Of what islands send.
    down_compression: Of what the hub sends: by how much the shared parameters
      moved.
  """

  islands: int = 4
  sync_period: int = 100
  outer: outer_lib.OuterConfig = outer_lib.OuterConfig()
  fragments: fragments_lib.FragmentConfig = fragments_lib.FragmentConfig()
  compression: compression_lib.CompressionConfig = (
    compression_lib.CompressionConfig(format='int8')
  )
  down_compression: compression_lib.CompressionConfig = (
    compression_lib.CompressionConfig(format='int8')
  )
  screening: screening_lib.ScreeningConfig = screening_lib.ScreeningConfig()
  rounds: RoundConfig = RoundConfig()

  @property
  def num_slots(self) -> int:
    """Rounds of the whole run: every fragment's, one after the other."""
    return self.loop.num_steps * self.fragments.count // self.sync_period

  def slot_step(self, slot: int) -> int:
    """Step of the fastest island at which a round begins."""
    return slot * self.sync_period // self.fragments.count

  def validate(self) -> None:
    """Checks every part and the rules across them, before any compilation."""
    for name in ('islands', 'sync_period'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.data.bpe_vocab_size is not None:
      raise ValueError(
        f'data.tokenizer={self.data.tokenizer!r} would be trained by each '
        "island on its own text; use 'bytes' or the same file for all."
      )
    self.fragments.check(
      num_layers=self.model.num_layers, sync_period=self.sync_period
    )
    if self.fragments.mixing and self.rounds.on_answer == 'keep':
      raise ValueError(
        f'fragments.mixing={self.fragments.mixing} is not used with '
        "rounds.on_answer='keep'; set it to 0, or rounds.on_answer='mix'."
      )
    self.screening.check(num_islands=self.islands)
    super().validate()
    if self.outer.optimizer == 'delayed_nesterov':
      raise ValueError(
        "outer.optimizer='delayed_nesterov' takes updates one by one and the "
        "hub merges them in rounds; set outer.optimizer='nesterov'."
      )
    if self.model.reads_images:
      raise ValueError(
        f'model.patch_size={self.model.patch_size} is of images, and islands '
        'over the internet read text; use experiments.diloco.'
      )
    if self.num_slots < 1:
      raise ValueError(
        f'loop.num_steps={self.loop.num_steps} must be at least '
        f'sync_period={self.sync_period}; raise it.'
      )


def fingerprint(config: IslandsConfig) -> str:
  """Hash of what all islands must agree on."""
  fields: dict[str, Any] = dataclasses.asdict(config)
  for name in _OWN_FIELDS:
    fields.pop(name)
  # Each island reads its own files, as many rows at a time as it can.
  data = fields.pop('data')
  fields['data'] = {
    'sequence_length': data['sequence_length'],
    'objective': data['objective'],
    'tokenizer': tokenizer.load(data['tokenizer']).fingerprint,
  }
  text = strict_json.to_json(fields)
  return hashlib.sha256(text.encode()).hexdigest()
