"""Makes a word-level tokenizer for a task that knows all its words."""

import re
from collections.abc import Sequence

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

SPECIAL_TOKENS = ('<|pad|>', '<|bos|>', '<|eos|>')
_MARK = '<|'
_BLANK = re.compile(r'\s')


def tokenizer_json(words: Sequence[str]) -> str:
  """Writes a tokenizer.json whose tokens are whole words between blanks.

  Text of such words with one space between two comes back from encoding and
  decoding as it was. Encoding any other word raises an error, as there is no
  token for unknown words; so does text that spells a special token.

  Args:
    words: The vocabulary; its tokens follow `SPECIAL_TOKENS` in this order.

  Returns:
    The JSON, for a file that `tokenizer.load` reads.

  Raises:
    ValueError: If a word is empty, repeated, has a blank in it or might be
      taken for a special token.
  """
  for word in words:
    if not word or _BLANK.search(word) or _MARK in word:
      raise ValueError(
        f'{word=} must be text without blanks and without {_MARK!r}; '
        'change the words of the task.'
      )
  if len(set(words)) != len(words):
    repeated = sorted({word for word in words if words.count(word) > 1})
    raise ValueError(
      f'words must differ, found {repeated} repeated; '
      'change the words of the task.'
    )
  vocabulary = {
    word: number for number, word in enumerate((*SPECIAL_TOKENS, *words))
  }
  # Without a decoder, tokens are joined by single spaces.
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary))
  # Special tokens are in the vocabulary, to come first in it: where text
  # spells one, make it a word that is not.
  tokenizer.normalizer = normalizers.Replace(_MARK, f'{_MARK} ')
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
  return tokenizer.to_str()
