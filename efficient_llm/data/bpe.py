"""Trains a byte-level BPE on the user's own text, once."""

import pathlib
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from efficient_llm.data import corpus, readers, staging, token_cache, tokenizer

_SPECIAL_TOKENS = ('<|bos|>', '<|eos|>', '<|pad|>', '<|mask|>')
_SMALLEST = len(pre_tokenizers.ByteLevel.alphabet()) + len(_SPECIAL_TOKENS)


def open_or_train(
  files: Sequence[corpus.File],
  *,
  vocab_size: int,
  options: readers.ReadOptions,
  cache_dir: pathlib.Path,
  log: token_cache.Log,
) -> tokenizer.Tokenizer:
  """Loads the tokenizer of these files, after training it where it is missing.

  It is trained on all text of the files, held out or not, so that it does not
  depend on what is held out.

  Args:
    files: The text.
    vocab_size: Size of the vocabulary, four special tokens included.
    options: How documents are taken out of the files.
    cache_dir: Folder that keeps the tokenizer.json.
    log: Takes a line where training begins.

  Returns:
    The tokenizer; smaller than asked for where the text has too few pairs.

  Raises:
    ValueError: If a file cannot be read, the size does not hold all bytes, or
      the tokenizer cannot be kept.
  """
  if vocab_size < _SMALLEST:
    raise ValueError(
      f'{vocab_size=} of a BPE must be at least {_SMALLEST}; '
      f"set data.tokenizer='bpe:{_SMALLEST}' or larger."
    )
  name = token_cache.key(files, options, f'bpe:{vocab_size}')
  path = cache_dir / f'tokenizer-{name}' / 'tokenizer.json'
  if not path.exists():
    log(f'data: training a BPE of {vocab_size:,} tokens')
    documents = (
      document
      for file in files
      for document, _ in readers.read_documents(file, options)
    )
    trained = train(documents, vocab_size=vocab_size)
    with staging.staged(path.parent) as folder:
      (folder / path.name).write_text(trained)
  return tokenizer.load(str(path))


def train(documents: Iterable[bytes], *, vocab_size: int) -> str:
  """Trains a BPE; the same documents give the same one.

  Args:
    documents: UTF-8 text.
    vocab_size: Size of the vocabulary, special tokens included.

  Returns:
    The text of the tokenizer.json.
  """
  trained = tokenizers.Tokenizer(models.BPE())
  trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  trained.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(_SPECIAL_TOKENS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  texts = (document.decode() for document in documents)
  trained.train_from_iterator(texts, trainer)
  return trained.to_str()
