"""What a data set is: of what it is made, how cut, in what order it comes."""

import dataclasses
from typing import Literal, get_args

from efficient_llm.data import corpus, readers
from efficient_llm.data.packing import Packing

Objective = Literal['causal', 'masked', 'classes']
InvalidUtf8 = Literal['replace', 'refuse']
IslandSharding = Literal['rows', 'files', 'sources']

_BPE_PREFIX = 'bpe:'
# What only text has, and what only images have.
_OF_TEXT = (
  'sources',
  'weights',
  'text_key',
  'document_separator',
  'invalid_utf8',
  'tokenizer',
  'sequence_length',
  'packing',
  'island_sharding',
)
_OF_IMAGES = ('image_size', 'image_channels', 'image_shift', 'image_flip')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Settings of the data pipeline.

  Attributes:
    path: 'stdlib' (the Python standard library's own sources, about 11 MB), or
      a file, folder or glob; see `readers` for the kinds of files. Of images
      'digits' (scikit-learn's) or what `image_files` describes.
    sources: Several such paths, instead of `path`.
    weights: Share of the sequences drawn from each source; equal when empty.
      Kept to within 1 % of the smallest share.
    text_key: Key or column that holds the text, in .jsonl and .parquet.
    document_separator: What parts the documents of a .txt or .md file: None
      for whole files, 'blank_line', or else the exact text of a line.
    invalid_utf8: Whether bytes that are not UTF-8 become U+FFFD or are refused.
    tokenizer: 'bytes', 'bpe:SIZE' to train one on this text, or the path of a
      tokenizer.json or SentencePiece .model.
    sequence_length: Tokens in a sequence.
    batch_size: Sequences in a batch, over all processes of one island.
    packing: How documents are put into sequences; see `packing.make_plan`.
    objective: Next-token prediction, masked tokens as in BERT, or the classes
      of images.
    validation_fraction: Share of the text held out: documents, chosen by the
      hash of their text, or the tail of each where documents are few. Images
      are chosen by the hash of their pixels.
    validation_path: Other data to validate on, instead of a share of this.
    image_size: Pixels along the side to which images are scaled and cut.
    image_channels: 3 colours, or 1 for shades of grey.
    image_shift: In training an image is moved by up to so many pixels, drawn
      anew every time; its edge is repeated.
    image_flip: In training every other image is mirrored, left to right.
    shuffle: Whether sequences come in a new random order every epoch.
    seed: Of order and masks.
    island_sharding: What islands part among them: all rows, files or sources.
    cache_dir: Folder of the token cache; None for the caller's choice.
    prefetch_batches: Batches made ahead.
  """

  path: str = corpus.STDLIB
  sources: tuple[str, ...] = ()
  weights: tuple[float, ...] = ()
  text_key: str = 'text'
  document_separator: str | None = None
  invalid_utf8: InvalidUtf8 = 'replace'
  tokenizer: str = 'bytes'
  sequence_length: int = 256
  batch_size: int = 32
  packing: Packing = 'best_fit'
  objective: Objective = 'causal'
  validation_fraction: float = 0.05
  validation_path: str | None = None
  image_size: int | None = None
  image_channels: int = 3
  image_shift: int = 0
  image_flip: bool = False
  shuffle: bool = True
  seed: int = 0
  island_sharding: IslandSharding = 'rows'
  cache_dir: str | None = None
  prefetch_batches: int = 4

  @property
  def paths(self) -> tuple[str, ...]:
    """The paths of all sources."""
    return self.sources or (self.path,)

  @property
  def bpe_vocab_size(self) -> int | None:
    """Size of the BPE to train; None where a tokenizer is given."""
    if not self.tokenizer.startswith(_BPE_PREFIX):
      return None
    return int(self.tokenizer.removeprefix(_BPE_PREFIX))

  @property
  def read_options(self) -> readers.ReadOptions:
    """How documents are taken out of files."""
    return readers.ReadOptions(
      text_key=self.text_key,
      document_separator=self.document_separator,
      invalid_utf8=self.invalid_utf8,
    )

  def validate(self) -> None:
    """Checks all that can be checked without reading the text.

    Raises:
      ValueError: With the rule, the value and the remedy, in one line.
    """
    self._validate_sources()
    self._validate_choices()
    self._validate_kind()
    for name, smallest in (
      ('sequence_length', 2),
      ('batch_size', 1),
      ('prefetch_batches', 1),
    ):
      if getattr(self, name) < smallest:
        raise ValueError(
          f'{name}={getattr(self, name)} must be at least {smallest}; '
          f'set data.{name}.'
        )
    if not 0 <= self.seed < 1 << 32:
      raise ValueError(f'{self.seed=} must be in [0, 2**32); set data.seed.')
    if not 0 <= self.validation_fraction < 1:
      raise ValueError(
        f'{self.validation_fraction=} must be in [0, 1); '
        'set data.validation_fraction.'
      )
    if self.document_separator == '':
      raise ValueError(
        "document_separator='' must be a line's text, 'blank_line' or None; "
        'set data.document_separator.'
      )

  def _validate_sources(self) -> None:
    if self.sources and self.path != corpus.STDLIB:
      raise ValueError(
        f'{self.path=} and {self.sources=} must not both be set; '
        'list all paths in data.sources.'
      )
    if not all(self.paths):
      raise ValueError("path='' must name some text; set data.path.")
    if self.weights and len(self.weights) != len(self.paths):
      raise ValueError(
        f'{self.weights=} must be one for each of the {len(self.paths)} '
        'sources; set data.weights.'
      )
    # Written so that not-a-number fails too.
    if not all(0 < weight < float('inf') for weight in self.weights):
      raise ValueError(
        f'{self.weights=} must be positive and finite; set data.weights, and '
        'leave out of data.sources what should have none.'
      )

  def _validate_choices(self) -> None:
    for name, choices in (
      ('invalid_utf8', get_args(InvalidUtf8)),
      ('packing', get_args(Packing)),
      ('objective', get_args(Objective)),
      ('island_sharding', get_args(IslandSharding)),
    ):
      if getattr(self, name) not in choices:
        raise ValueError(
          f'{name}={getattr(self, name)!r} must be one of {choices}; '
          f'set data.{name}.'
        )
    size = self.tokenizer.removeprefix(_BPE_PREFIX)
    if self.tokenizer.startswith(_BPE_PREFIX) and not (
      size.isascii() and size.isdigit()
    ):
      raise ValueError(
        f"tokenizer={self.tokenizer!r} must end in a number, as 'bpe:4096'; "
        'set data.tokenizer.'
      )

  def _validate_kind(self) -> None:
    """Refuses settings of text for images, and the other way round."""
    is_images = self.objective == 'classes'
    for name in _OF_TEXT if is_images else _OF_IMAGES:
      if getattr(self, name) != getattr(DataConfig, name):
        raise ValueError(
          f'{name}={getattr(self, name)!r} is for '
          f'{"text" if is_images else "images"}, and data.objective is '
          f'{self.objective!r}; leave data.{name} out.'
        )
    if not is_images:
      return
    if self.path == corpus.STDLIB:
      raise ValueError(
        f"path={self.path!r} is text; set data.path='digits' or to images, or "
        'data.objective.'
      )
    if self.image_size is None or self.image_size < 1:
      raise ValueError(
        f'image_size={self.image_size} must be at least 1; set data.image_size '
        'to the model.image_size.'
      )
    if self.image_channels not in (1, 3):
      raise ValueError(
        f'image_channels={self.image_channels} must be 1 or 3; set '
        'data.image_channels.'
      )
    if not 0 <= self.image_shift < self.image_size:
      raise ValueError(
        f'image_shift={self.image_shift} must be in [0, '
        f'image_size={self.image_size}); set data.image_shift.'
      )
