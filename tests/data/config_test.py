"""Settings that cannot be meant are refused in one line with the remedy."""

import pytest

from efficient_llm.data import config


def test_the_defaults_are_valid():
  config.DataConfig().validate()


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('sequence_length', 1),
    ('batch_size', 0),
    ('prefetch_batches', 0),
    ('seed', -1),
    ('seed', 1 << 32),
    ('validation_fraction', 1.0),
    ('validation_fraction', -0.1),
    ('validation_fraction', float('nan')),
    ('document_separator', ''),
    ('path', ''),
    ('packing', 'tight'),
    ('objective', 'prefix'),
    ('invalid_utf8', 'ignore'),
    ('island_sharding', 'documents'),
    ('tokenizer', 'bpe:many'),
    ('tokenizer', 'bpe:'),
    ('tokenizer', 'bpe:-5'),
    ('weights', (1.0, 1.0)),
    ('weights', (-1.0,)),
    ('weights', (0.0,)),
    ('weights', (float('nan'),)),
  ],
)
def test_a_value_out_of_range_is_refused(field, value):
  with pytest.raises(ValueError, match=rf'data\.{field}') as refusal:
    config.DataConfig(**{field: value}).validate()
  assert '\n' not in str(refusal.value)
  assert field in str(refusal.value)


def test_a_path_beside_sources_is_refused():
  with pytest.raises(ValueError, match='must not both be set'):
    config.DataConfig(path='a.txt', sources=('b.txt',)).validate()


def test_sources_take_the_place_of_the_path():
  assert config.DataConfig(sources=('a', 'b')).paths == ('a', 'b')
  assert config.DataConfig(path='c').paths == ('c',)


def test_a_bpe_to_train_is_told_from_a_file():
  assert config.DataConfig(tokenizer='bpe:4096').bpe_vocab_size == 4096
  assert config.DataConfig(tokenizer='bpe.json').bpe_vocab_size is None
