"""Runs made of checkpoints of transformers, and the way back."""

import dataclasses
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

from efficient_llm.data import bpe
from efficient_llm.data import tokenizer as tokenizer_lib
from efficient_llm.ligo import config as ligo_config
from efficient_llm.ligo import train as ligo
from efficient_llm.models.huggingface import checkpoint, hub, shards
from efficient_llm.training import interchange, pretrain, trained_run
from tests import tiny
from tests.models.huggingface import made

_TEXTS = ['to be or not', 'naïve\n  café\t\x00!', '<|bos|>']


def _with_tokenizer(folder: pathlib.Path, name: str) -> pathlib.Path:
  """A checkpoint of bfloat16 with a tokenizer."""
  made.write(
    folder,
    name,
    made.bfloat16(made.weights(name)),
    bos_token_id=7,
    architectures=None,
  )
  text = bpe.train([b'ab ab cd'], vocab_size=262)
  (folder / 'tokenizer.json').write_text(text)
  (folder / 'tokenizer_config.json').write_text('{"model_max_length": 16}')
  return folder


@pytest.mark.parametrize('name', made.CONFIGS)
def test_there_and_back_leaves_every_bit(
  name: str, tmp_path: pathlib.Path
) -> None:
  theirs = _with_tokenizer(tmp_path / 'theirs', name)
  interchange.import_run(f'hf:{theirs}', tmp_path / 'run')
  # A run may be moved.
  (tmp_path / 'run').rename(tmp_path / 'moved')
  run = trained_run.find(tmp_path / 'moved', name='checkpoint')
  interchange.export_run(run, tmp_path / 'back')
  before, after = (
    shards.open_folder(theirs),
    shards.open_folder(tmp_path / 'back'),
  )
  prefix = 'transformer.' if name == 'gpt2' else ''
  for tensor, one in before.items():
    two = after[prefix + tensor]
    assert two.dtype == 'BF16'
    rows = one.shape[0]
    np.testing.assert_array_equal(one.read(0, rows), two.read(0, rows))
  for file in ('tokenizer.json', 'tokenizer_config.json'):
    first, second = (x / file for x in (theirs, tmp_path / 'back'))
    assert first.read_bytes() == second.read_bytes()
  document = json.loads((tmp_path / 'back' / 'config.json').read_text())
  assert document['bos_token_id'] == 7
  assert document['dtype'] == 'bfloat16'


def test_a_folder_of_transformers_stands_for_a_run(
  tmp_path: pathlib.Path,
) -> None:
  theirs = _with_tokenizer(tmp_path / 'theirs', 'qwen3')
  run = trained_run.find(f'hf:{theirs}', name='checkpoint')
  assert (run.step, run.reference) == (0, f'hf:{theirs}')
  assert run.describe()['workdir'] == run.reference
  assert run.load_tokenizer().decode(run.load_tokenizer().encode('ab')) == 'ab'
  jax.tree.map(
    np.testing.assert_array_equal,
    run.restore_params(None),
    checkpoint.open_checkpoint(theirs).read(),
  )
  copied = pathlib.Path(shutil.copytree(theirs, tmp_path / 'copy'))
  again = trained_run.find(f'hf:{copied}', name='checkpoint')
  assert again.digest == run.digest
  path = copied / shards.SINGLE
  path.write_bytes(path.read_bytes()[:-1] + b'\x01')
  other = trained_run.find(f'hf:{copied}', name='checkpoint')
  assert other.digest != run.digest
  with pytest.raises(ValueError, match='must be taken at step 0'):
    trained_run.find(f'hf:{theirs}', name='checkpoint', step=3)


def test_a_model_without_a_tokenizer_can_be_imported(
  tmp_path: pathlib.Path,
) -> None:
  theirs = made.write(tmp_path / 'theirs', 'llama')
  run = interchange.import_run(f'hf:{theirs}', tmp_path / 'run')
  assert not run.has_tokenizer
  with pytest.raises(ValueError, match=r'tokenizer\.json.* must be a readable'):
    run.load_tokenizer()
  interchange.export_run(run, tmp_path / 'back', dtype='float16')
  assert checkpoint.open_checkpoint(tmp_path / 'back').dtype == 'F16'


def test_neither_way_overwrites(tmp_path: pathlib.Path) -> None:
  theirs = made.write(tmp_path / 'theirs', 'llama')
  run = interchange.import_run(f'hf:{theirs}', tmp_path / 'run')
  with pytest.raises(ValueError, match='must be new and holds a run'):
    interchange.import_run(f'hf:{theirs}', tmp_path / 'run')
  with pytest.raises(ValueError, match=r'must be new, holds config\.json'):
    interchange.export_run(run, theirs)


def test_an_imported_model_grows_and_the_grown_one_is_exported(
  tmp_path: pathlib.Path,
) -> None:
  text = tiny.write_text(tmp_path)
  base = tiny.config(text, cache_dir=tmp_path / 'cache', num_steps=3)
  pretrain.train(base, workdir=tmp_path / 'first')
  first = trained_run.find(tmp_path / 'first', name='first')
  interchange.export_run(first, tmp_path / 'small')
  small = trained_run.find(f'hf:{tmp_path / "small"}', name='small')
  fields = {
    field.name: getattr(base, field.name) for field in dataclasses.fields(base)
  }
  large = dataclasses.replace(small.model, num_layers=2)
  data = dataclasses.replace(base.data, tokenizer=small.data.tokenizer)
  fields |= {'model': large, 'small': small.reference, 'data': data}
  fields['method'] = 'identity'
  config = ligo_config.LigoConfig(**fields)
  assert ligo.train(config, workdir=tmp_path / 'large').stopped_by is None
  grown = trained_run.find(tmp_path / 'large', name='large')
  interchange.export_run(grown, tmp_path / 'out')
  opened = checkpoint.open_checkpoint(tmp_path / 'out')
  assert opened.model.num_layers == 2
  jax.tree.map(
    np.testing.assert_array_equal, opened.read(), grown.restore_params(None)
  )
  document = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert (document['bos_token_id'], document['eos_token_id']) == (256, 257)
  with pytest.raises(ValueError, match='moments=True needs a pre-training run'):
    ligo.train(
      dataclasses.replace(config, moments=True), workdir=tmp_path / 'no'
    )


def test_bytes_as_a_tokenizer_of_others_are_the_same_numbers(
  tmp_path: pathlib.Path,
) -> None:
  ours = tokenizer_lib.load('bytes')
  for name, content in ours.files().items():
    (tmp_path / name).write_bytes(content)
  theirs = tokenizer_lib.load(str(tmp_path / 'tokenizer.json'))
  for text in [*_TEXTS, ''.join(map(chr, range(256)))]:
    assert theirs.encode(text).tolist() == ours.encode(text).tolist()
    assert theirs.decode(theirs.encode(text)) == text
  for name in ('bos_id', 'eos_id', 'pad_id', 'mask_id'):
    assert getattr(theirs, name) == getattr(ours, name)


def test_a_repository_is_fetched_without_pickles_and_code(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  asked = {}

  def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
    asked[name] = allow_patterns
    return str(tmp_path)

  library = types.SimpleNamespace(snapshot_download=snapshot_download)
  monkeypatch.setitem(__import__('sys').modules, 'huggingface_hub', library)
  assert hub.folder('hf:owner/name') == tmp_path
  assert not {'*.bin', '*.py', '*'} & set(asked['owner/name'])

  def failing(name: str, *, allow_patterns: list[str]) -> str:
    raise OSError('no\nnetwork')

  library.snapshot_download = failing
  with pytest.raises(ValueError, match='could not be fetched: no network'):
    hub.folder('hf:owner/name')
  with pytest.raises(ValueError, match='a folder or OWNER/NAME'):
    hub.folder('hf:/not/a/folder')
  monkeypatch.setitem(__import__('sys').modules, 'huggingface_hub', None)
  with pytest.raises(ValueError, match='needs huggingface_hub'):
    hub.folder('hf:owner/name')
