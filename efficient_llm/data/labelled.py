"""Texts with labels, or pairs of texts -> batches for classification.

A batch is a dict of 'tokens', 'segment_ids', 'positions' and 'token_types'
[B, T], a text or pair in each row, and of 'targets' and 'loss_weights' [B, 1]:
a row has one target, the number of its label. A pair is put end to end, each
text ending in the end token.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from efficient_llm.data import (
  batches,
  dataset,
  images,
  labelled_files,
  splits,
  stream,
)
from efficient_llm.data import config as config_lib
from efficient_llm.data import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class LabelledConfig:
  """Where texts and labels are, and how they come.

  Attributes:
    path: A .csv, .tsv or .jsonl file, or a folder or glob of them.
    text_key: Column or key that holds the text.
    second_text_key: The same of a second text, where pairs are classified.
    label_key: Column or key that holds the label.
    validation_fraction: Share of the rows held out, chosen by the hash of their
      text.
    validation_path: Other rows to validate on, instead of a share of these.
    sequence_length: Tokens of a row; what is longer loses its end.
    batch_size: Rows in a batch, over all processes.
    seed: Of the order.
  """

  path: str = ''
  text_key: str = 'text'
  second_text_key: str | None = None
  label_key: str = 'label'
  validation_fraction: float = 0.1
  validation_path: str | None = None
  sequence_length: int = 128
  batch_size: int = 32
  seed: int = 0

  def validate(self) -> None:
    """Checks all that can be checked without reading the rows."""
    if not self.path:
      raise ValueError("path='' must name a file of labels; set data.path.")
    if self.sequence_length < 8:
      raise ValueError(
        f'{self.sequence_length=} must be at least 8; set data.sequence_length.'
      )
    self.order.validate()

  def read(self, path: str) -> list[labelled_files.Row]:
    """Reads the rows of some files."""
    texts = [self.text_key]
    if self.second_text_key is not None:
      texts.append(self.second_text_key)
    return labelled_files.read(path, texts=texts, label=self.label_key)

  @property
  def order(self) -> config_lib.DataConfig:
    """What decides in which order rows come, as all data sets have it."""
    return config_lib.DataConfig(
      path=self.path,
      validation_fraction=self.validation_fraction,
      validation_path=self.validation_path,
      batch_size=self.batch_size,
      seed=self.seed,
    )


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows as numbers.

  Attributes:
    tokens: [rows, T], filled up at the end.
    segments: [rows, T]: 1 in a text, 2 in the second of a pair, 0 behind both.
    labels: For each row the number of its label.
    num_cut: Rows that were too long.
  """

  tokens: np.ndarray
  segments: np.ndarray
  labels: np.ndarray
  num_cut: int


class Dataset(dataset.Dataset):
  """One split of a table of texts with labels.

  Attributes:
    classes: The labels.
  """

  def __init__(
    self,
    config: LabelledConfig,
    *,
    split: splits.Split,
    rows: Rows,
    classes: images.Classes,
  ):
    settings = [split, config.seed, classes.fingerprint]
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    for array in (rows.tokens, rows.segments, rows.labels):
      digest.update(array.tobytes())
    order = dataclasses.replace(config.order, objective='classes')
    super().__init__(order, split=split, fingerprint=digest.hexdigest())
    self.classes = classes
    self._rows = rows

  @property
  def vocabulary(self) -> images.Classes:
    """Targets are labels."""
    return self.classes

  def statistics(self) -> dict[str, int | float]:
    """Counts rows and labels; always the commonest is right so often."""
    counts = np.bincount(self._rows.labels, minlength=self.classes.vocab_size)
    return {
      'rows': len(self._rows.labels),
      'cut_rows': self._rows.num_cut,
      'classes': self.classes.vocab_size,
      'commonest_share': float(counts.max() / counts.sum()),
    }

  def _examples(self) -> dataset.Examples:
    return dataset.Examples([len(self._rows.labels)], (1.0,), self._read)

  def _read(self, rows: Sequence[tuple[int, int]]) -> batches.Batch:
    _, numbers = np.array(rows, np.int64).T
    is_there = numbers != stream.PADDING
    chosen = np.where(is_there, numbers, 0)
    tokens, segments = self._rows.tokens[chosen], self._rows.segments[chosen]
    positions = np.arange(tokens.shape[1], dtype=np.int32)
    return {
      'tokens': tokens,
      'segment_ids': np.minimum(segments, 1),
      'positions': np.broadcast_to(positions, tokens.shape),
      'token_types': np.maximum(segments - 1, 0),
      'targets': np.where(is_there, self._rows.labels[chosen], 0)[:, None],
      'loss_weights': is_there.astype(np.float32)[:, None],
    }


def open_both(
  config: LabelledConfig, tokenizer: tokenizer_lib.Tokenizer
) -> tuple[Dataset, Dataset | None]:
  """Opens the training and the validation split, if there is one.

  Equal texts are all in one split. The labels are those of `config.path`.

  Args:
    config: The rows.
    tokenizer: Of the model that reads them.

  Raises:
    ValueError: If the configuration or the rows will not do, in one line.
  """
  config.validate()
  table = config.read(config.path)
  classes = images.Classes(tuple(sorted({row.label for row in table})))
  if classes.vocab_size < 2:
    raise ValueError(
      f'{config.path!r} must have two labels or more under label_key='
      f'{config.label_key!r}, found {list(classes.names)}; set data.label_key.'
    )
  hashes = labelled_files.hashes(table)
  if config.validation_path is None:
    held_out = splits.chosen_by_hash(hashes, config.validation_fraction)
    others = [row for row, out in zip(table, held_out, strict=True) if out]
  else:
    others = config.read(config.validation_path)
    held_out = np.isin(hashes, labelled_files.hashes(others))
    unknown = sorted({row.label for row in others} - set(classes.names))
    if unknown:
      raise ValueError(
        f'validation_path={config.validation_path!r} must have no label that '
        f'data.path has not, and has {unknown[0]!r}; set data.validation_path.'
      )
  kept = [row for row, out in zip(table, held_out, strict=True) if not out]

  def made(split: splits.Split, table: list[labelled_files.Row]) -> Dataset:
    if not table:
      raise ValueError(
        f'{config.path!r} must have a row for {split} and has none; set '
        'data.validation_fraction, or data.path to more rows.'
      )
    rows = _encode(table, classes, tokenizer, config.sequence_length)
    return Dataset(config, split=split, rows=rows, classes=classes)

  if not config.validation_fraction and config.validation_path is None:
    return made('train', kept), None
  return made('train', kept), made('validation', others)


def _encode(
  table: list[labelled_files.Row],
  classes: images.Classes,
  tokenizer: tokenizer_lib.Tokenizer,
  length: int,
) -> Rows:
  """Turns rows into numbers; of a pair the longer text is cut first."""
  begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  numbers = {name: number for number, name in enumerate(classes.names)}
  tokens = np.full((len(table), length), tokenizer.pad_id or 0, np.int32)
  segments = np.zeros((len(table), length), np.int32)
  num_cut = 0
  for row, ids, kinds in zip(table, tokens, segments, strict=True):
    encoded = [tokenizer.encode(text) for text in row.texts]
    room = length - len(begin) - len(end) * len(encoded)
    num_cut += sum(map(len, encoded)) > room
    if len(encoded) == 2:
      half = max(room - room // 2, room - len(encoded[1]))
      encoded[0] = encoded[0][:half]
      encoded[1] = encoded[1][: room - len(encoded[0])]
    first = [*begin, *encoded[0][:room], *end]
    ids[: len(first)], kinds[: len(first)] = first, 1
    for other in encoded[1:]:
      stop = len(first) + len(other) + len(end)
      ids[len(first) : stop] = [*other, *end]
      kinds[len(first) : stop] = 2
  labels = np.array([numbers[row.label] for row in table], np.int32)
  return Rows(tokens, segments, labels, num_cut)
