"""Tokenizers turn text into numbers and back, and never invent special ones."""

import hypothesis
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from efficient_llm.data import bpe, corpus, readers, tokenizer

_TEXT = st.text(st.characters(exclude_categories=['Cs']))
_SENTENCES = [
  f'The quick brown fox number {i} jumps over {i * 7} lazy dogs, '
  f'and the {"bcdfghjklm"[i % 10]}ear sleeps.'
  for i in range(300)
]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
  documents = [sentence.encode() for sentence in _SENTENCES]
  path.write_text(bpe.train(documents, vocab_size=400))
  return tokenizer.load(str(path))


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
  prefix = tmp_path_factory.mktemp('spm') / 'pieces'
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(_SENTENCES),
    model_prefix=str(prefix),
    vocab_size=400,
    byte_fallback=True,
    user_defined_symbols=['[MASK]'],
    minloglevel=2,
  )
  return tokenizer.load(f'{prefix}.model')


@pytest.fixture(params=['bytes', 'trained', 'pieces'])
def encoder(request):
  if request.param == 'bytes':
    return tokenizer.load('bytes')
  return request.getfixturevalue(request.param)


@hypothesis.given(text=_TEXT)
def test_bytes_round_trip(text):
  encoder = tokenizer.load('bytes')
  assert encoder.decode(encoder.encode(text)) == text


@hypothesis.given(text=_TEXT)
def test_a_trained_bpe_round_trips(trained, text):
  assert trained.decode(trained.encode(text)) == text


def test_sentences_round_trip(encoder):
  for sentence in _SENTENCES[:20]:
    assert encoder.decode(encoder.encode(sentence)) == sentence


def test_documents_are_framed_and_encoded_as_text_is(encoder):
  documents = [s.encode() for s in (*_SENTENCES[:20], 'x', 'naïve')]
  tokens, lengths = encoder.encode_documents(documents)
  assert tokens.max() < encoder.vocab_size
  parts = np.split(tokens, np.cumsum(lengths)[:-1])
  for document, part in zip(documents, parts, strict=True):
    ordinary = encoder.encode(document.decode()).tolist()
    assert part.tolist() == [encoder.bos_id, *ordinary, encoder.eos_id]


def test_text_that_spells_special_tokens_makes_none(encoder):
  text = '<|bos|> <|eos|> <|pad|> <|mask|> <s> </s> <unk>'
  assert not encoder.special_ids & set(encoder.encode(text).tolist())


def test_special_tokens_are_known_apart(encoder):
  special = [encoder.bos_id, encoder.eos_id, encoder.mask_id]
  assert None not in special
  assert set(special) <= encoder.special_ids
  assert len(set(special)) == 3


def test_special_tokens_are_left_out_of_text(encoder):
  tokens = [encoder.bos_id, *encoder.encode('The fox'), encoder.eos_id]
  assert encoder.decode(tokens) == 'The fox'


def test_training_twice_gives_the_same_tokenizer():
  documents = [sentence.encode() for sentence in _SENTENCES]
  once = bpe.train(documents, vocab_size=400)
  assert once == bpe.train(documents, vocab_size=400)


def test_a_trained_tokenizer_is_kept(tmp_path):
  (tmp_path / 'a.txt').write_text('\n'.join(_SENTENCES))
  lines = []
  first, second = (
    bpe.open_or_train(
      corpus.find_files(str(tmp_path / 'a.txt')),
      vocab_size=300,
      options=readers.ReadOptions(),
      cache_dir=tmp_path / 'cache',
      log=lines.append,
    )
    for _ in range(2)
  )
  assert first.fingerprint == second.fingerprint
  assert first.vocab_size == 300
  assert len(lines) == 1


def test_a_bert_vocabulary_has_its_special_tokens(tmp_path):
  words = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
  words.pre_tokenizer = pre_tokenizers.Whitespace()
  names = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
  words.train_from_iterator(
    _SENTENCES,
    trainers.WordPieceTrainer(
      vocab_size=200, special_tokens=names, show_progress=False
    ),
  )
  words.save(str(tmp_path / 'tokenizer.json'))
  found = tokenizer.load(str(tmp_path / 'tokenizer.json'))
  assert (found.pad_id, found.bos_id, found.eos_id, found.mask_id) == (
    0,
    2,
    3,
    4,
  )


def test_a_missing_mask_token_is_none(tmp_path):
  letters = tokenizers.Tokenizer(models.BPE({'a': 0, 'b': 1}, []))
  letters.save(str(tmp_path / 'tokenizer.json'))
  found = tokenizer.load(str(tmp_path / 'tokenizer.json'))
  assert found.mask_id is None
  assert found.eos_id is None
  assert found.encode_documents([b'ab', b'b'])[0].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
  'name', ['words', 'gone.json', 'bad.json', 'bad.model']
)
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, name):
  for broken in ('bad.json', 'bad.model'):
    (tmp_path / broken).write_text('{"model": 3}')
  with pytest.raises(
    ValueError, match=r'^tokenizer=.*; set data\.tokenizer\.$'
  ):
    tokenizer.load(name if name == 'words' else str(tmp_path / name))


def test_a_bpe_too_small_for_all_bytes_is_refused(tmp_path):
  with pytest.raises(ValueError, match='must be at least 260'):
    bpe.open_or_train(
      [],
      vocab_size=259,
      options=readers.ReadOptions(),
      cache_dir=tmp_path,
      log=print,
    )
