"""Turns text into token numbers and back: bytes, BPE or SentencePiece.

`load` takes 'bytes', the path of a Hugging Face `tokenizer.json`, or the path
of a SentencePiece `.model`; `bpe` makes a tokenizer.json from text.

Every document begins with the tokenizer's `bos_id` and ends with its `eos_id`,
where it has them.
"""

import contextlib
import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

BYTES = 'bytes'
_BOS_NAMES = ('<|bos|>', '<bos>', '<s>', '[CLS]', '<|begin_of_text|>')
_EOS_NAMES = ('<|eos|>', '<eos>', '</s>', '[SEP]', '<|end_of_text|>')
_PAD_NAMES = ('<|pad|>', '<pad>', '[PAD]')
_MASK_NAMES = ('<|mask|>', '<mask>', '[MASK]')
# GPT-2 and its kin mark the end of a text with this, and nothing else.
_ONLY_MARK = '<|endoftext|>'
_NUM_BYTES = 256
_BYTE_BOS = 256
_BYTE_EOS = 257


class Tokenizer(Protocol):
  """What the data pipeline and the samplers need of a tokenizer.

  Attributes:
    vocab_size: Above every token number.
    bos_id, eos_id, pad_id, mask_id: Special tokens, None where missing.
    special_ids: Every number that does not stand for text.
    fingerprint: The same for tokenizers that encode alike, else different.
  """

  vocab_size: int
  bos_id: int | None
  eos_id: int | None
  pad_id: int | None
  mask_id: int | None
  special_ids: frozenset[int]
  fingerprint: str

  def encode(self, text: str) -> np.ndarray:
    """Encodes text without adding special tokens, int32."""
    ...

  def decode(self, tokens: Iterable[int]) -> str:
    """Decodes tokens, leaving out special ones."""
    ...

  def encode_documents(
    self, documents: Sequence[bytes]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Encodes UTF-8 documents, each between `bos_id` and `eos_id`.

    Returns:
      The tokens of all documents end to end, and the length of each.
    """
    ...

  def files(self) -> dict[str, bytes]:
    """The files that hold it for other programs, by name."""
    ...


class ByteTokenizer:
  """Each byte of UTF-8 is a token; four special tokens follow."""

  # A multiple of 64 shards evenly; the numbers above mask_id stay unused.
  vocab_size: int = 320
  bos_id: int | None = _BYTE_BOS
  eos_id: int | None = _BYTE_EOS
  pad_id: int | None = _NUM_BYTES + 2
  mask_id: int | None = _NUM_BYTES + 3
  special_ids: frozenset[int] = frozenset(range(_NUM_BYTES, vocab_size))
  fingerprint: str = 'bytes-320'

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, tokens: Iterable[int]) -> str:
    return bytes(t for t in tokens if t < _NUM_BYTES).decode(errors='replace')

  def encode_documents(
    self, documents: Sequence[bytes]
  ) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(d) + 2 for d in documents], np.int64)
    joined = b'\0' + b'\0\0'.join(documents) + b'\0'
    tokens = np.frombuffer(joined, np.uint8).astype(np.uint16)
    ends = np.cumsum(lengths)
    tokens[ends - lengths] = _BYTE_BOS
    tokens[ends - 1] = _BYTE_EOS
    return tokens, lengths

  def files(self) -> dict[str, bytes]:
    # A BPE that merges nothing; the library spells bytes as characters.
    spelled = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    plain = [chr(b) for b in range(_NUM_BYTES) if chr(b) in spelled]
    rest = iter(sorted(set(spelled) - set(plain)))
    vocabulary = {
      chr(b) if chr(b) in plain else next(rest): b for b in range(_NUM_BYTES)
    }
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    names = (_BOS_NAMES, _EOS_NAMES, _PAD_NAMES, _MASK_NAMES)
    made.add_special_tokens([one[0] for one in names])
    return {'tokenizer.json': made.to_str(pretty=True).encode()}


class JsonTokenizer:
  """A tokenizer of the `tokenizers` library, from its JSON."""

  def __init__(self, json_text: str):
    self._json_text = json_text
    self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
    # Text that spells a special token must not become one.
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1
    self.bos_id = _find(vocabulary, (*_BOS_NAMES, _ONLY_MARK))
    self.eos_id = _find(vocabulary, (*_EOS_NAMES, _ONLY_MARK))
    self.pad_id = _find(vocabulary, _PAD_NAMES)
    self.mask_id = _find(vocabulary, _MASK_NAMES)
    added = self._tokenizer.get_added_tokens_decoder()
    unused = set(range(self.vocab_size)) - set(vocabulary.values())
    self.special_ids = frozenset(
      {number for number, token in added.items() if token.special} | unused
    )
    self.fingerprint = _digest(json_text.encode())

  def encode(self, text: str) -> np.ndarray:
    with self._knowing():
      encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return np.array(encoding.ids, np.int32)

  def decode(self, tokens: Iterable[int]) -> str:
    kept = [int(t) for t in tokens if int(t) not in self.special_ids]
    return self._tokenizer.decode(kept)

  def encode_documents(
    self, documents: Sequence[bytes]
  ) -> tuple[np.ndarray, np.ndarray]:
    with self._knowing():
      encodings = self._tokenizer.encode_batch_fast(
        [d.decode() for d in documents], add_special_tokens=False
      )
    return _join([e.ids for e in encodings], self.bos_id, self.eos_id)

  def files(self) -> dict[str, bytes]:
    return {'tokenizer.json': self._json_text.encode()}

  @contextlib.contextmanager
  def _knowing(self) -> Iterator[None]:
    """Says what text may hold where the tokenizer has no word for a part."""
    try:
      yield
    except Exception as error:
      # The library raises nothing more special.
      if 'UNK' not in str(error):
        raise
      special = self._tokenizer.get_added_tokens_decoder()
      words = [
        word
        for word, number in sorted(self._tokenizer.get_vocab().items())
        if number not in special
      ]
      raise ValueError(
        f'The text must be of the {len(words)} words that the tokenizer knows, '
        f'such as {" ".join(words[:20])}; choose other text.'
      ) from error


class SentencePieceTokenizer:
  """A SentencePiece model, from its bytes."""

  def __init__(self, model: bytes):
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = self._processor
    self.vocab_size = pieces.vocab_size()
    self.bos_id = _known(pieces.bos_id())
    self.eos_id = _known(pieces.eos_id())
    self.pad_id = _known(pieces.pad_id())
    vocabulary = {
      name: pieces.piece_to_id(name)
      for name in _MASK_NAMES
      if pieces.piece_to_id(name) != pieces.unk_id()
    }
    self.mask_id = _find(vocabulary, _MASK_NAMES)
    self.special_ids = frozenset(
      number
      for number in range(self.vocab_size)
      if pieces.is_control(number)
      or pieces.is_unknown(number)
      or pieces.is_unused(number)
      or number == self.mask_id
    )
    self.fingerprint = _digest(model)

  def encode(self, text: str) -> np.ndarray:
    return np.array(self._processor.encode(text), np.int32)

  def decode(self, tokens: Iterable[int]) -> str:
    kept = [int(t) for t in tokens if int(t) not in self.special_ids]
    return self._processor.decode(kept)

  def encode_documents(
    self, documents: Sequence[bytes]
  ) -> tuple[np.ndarray, np.ndarray]:
    encoded = self._processor.encode([d.decode() for d in documents])
    return _join(encoded, self.bos_id, self.eos_id)

  def files(self) -> dict[str, bytes]:
    return {'tokenizer.model': self._processor.serialized_model_proto()}


def load(name: str) -> Tokenizer:
  """Loads a tokenizer.

  Args:
    name: 'bytes', or the path of a tokenizer.json or of a SentencePiece model.

  Returns:
    The tokenizer.

  Raises:
    ValueError: If the file is not there or is not such a file.
  """
  if name == BYTES:
    return ByteTokenizer()
  path = pathlib.Path(name)
  if path.suffix not in ('.json', '.model'):
    raise ValueError(
      f'tokenizer={name!r} must be "bytes", "bpe:SIZE" or the path of a '
      '.json or .model file; set data.tokenizer.'
    )
  try:
    raw = path.read_bytes()
    if path.suffix == '.model':
      return SentencePieceTokenizer(raw)
    return JsonTokenizer(raw.decode())
  # The tokenizers library raises bare Exception for what it cannot parse.
  except Exception as error:
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise ValueError(
      f'tokenizer={name!r} must be a readable tokenizer file: {reason}; '
      'set data.tokenizer.'
    ) from error


def _find(vocabulary: dict[str, int], names: Sequence[str]) -> int | None:
  return next((vocabulary[n] for n in names if n in vocabulary), None)


def _known(number: int) -> int | None:
  """SentencePiece says -1 for a token that a model lacks."""
  return number if number >= 0 else None


def _join(
  encoded: Sequence[list[int]], bos_id: int | None, eos_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
  before = [] if bos_id is None else [bos_id]
  after = [] if eos_id is None else [eos_id]
  framed = [before + ids + after for ids in encoded]
  lengths = np.array([len(ids) for ids in framed], np.int64)
  flat = itertools.chain.from_iterable(framed)
  return np.fromiter(flat, np.uint32, count=int(lengths.sum())), lengths


def _digest(content: bytes) -> str:
  return hashlib.blake2b(content, digest_size=16).hexdigest()
