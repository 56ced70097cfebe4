"""Checkpoints of every family: read right, written right, refused by name.

Over 300 lines: what is refused is a table.
"""

import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm import sharding
from efficient_llm.models import presets, transformer
from efficient_llm.models.huggingface import (
  checkpoint,
  export,
  families,
  safetensors_file,
  shards,
)
from tests.models import architectures
from tests.models.huggingface import made

_TOKENS = np.array([3, 20, 7, 7, 2, 11, 22, 5], np.int32)


def _ours(folder: pathlib.Path) -> np.ndarray:
  opened = checkpoint.open_checkpoint(folder)
  return np.asarray(
    architectures.forward(opened.model, opened.read(), _TOKENS[None]).logits
  )[0]


@pytest.mark.parametrize('name', made.CONFIGS)
def test_logits_are_those_of_plain_numpy(
  name: str, tmp_path: pathlib.Path
) -> None:
  folder = made.write(tmp_path / 'theirs', name)
  wanted = made.logits(name, made.weights(name), _TOKENS)
  # Float32 against float64, through sums of a dozen terms.
  np.testing.assert_allclose(_ours(folder), wanted, atol=5e-5, rtol=5e-5)


def test_stretched_positions_come_and_go(tmp_path: pathlib.Path) -> None:
  folder = made.write(tmp_path / 'a', 'llama', rope_scaling=made.STRETCHED)
  opened = checkpoint.open_checkpoint(folder)
  # Eight tokens, of which the original texts had four.
  wanted = made.logits('llama', made.weights('llama'), _TOKENS, stretched=True)
  np.testing.assert_allclose(_ours(folder), wanted, atol=5e-5, rtol=5e-5)
  plain = made.logits('llama', made.weights('llama'), _TOKENS)
  assert np.abs(wanted - plain).max() > 1e-2
  document = families.write(opened.model, opened.family)
  for changes in ({'rope_scaling': None}, {'rope_parameters': None}):
    model = families.parse({**document, **changes}, path='config.json')[1]
    assert model == opened.model


def test_bfloat16_is_read_without_loss(tmp_path: pathlib.Path) -> None:
  tensors = made.bfloat16(made.weights('llama'))
  folder = made.write(tmp_path / 'theirs', 'llama', tensors)
  wanted = made.logits('llama', tensors, _TOKENS)
  np.testing.assert_allclose(_ours(folder), wanted, atol=5e-5, rtol=5e-5)
  assert checkpoint.open_checkpoint(folder).dtype == 'BF16'


@pytest.mark.parametrize('name', made.CONFIGS)
def test_an_export_holds_the_tensors_that_were_imported(
  name: str, tmp_path: pathlib.Path
) -> None:
  opened = checkpoint.open_checkpoint(made.write(tmp_path / 'theirs', name))
  export.write(
    tmp_path / 'ours', opened.model, opened.read(), max_shard_bytes=1500
  )
  stored = shards.open_folder(tmp_path / 'ours')
  assert len(shards.files(stored)) > 3
  prefix = 'transformer.' if name == 'gpt2' else ''
  before = made.weights(name)
  assert set(stored) == {prefix + tensor for tensor in before}
  for tensor, value in before.items():
    found = stored[prefix + tensor]
    assert found.shape == value.shape
    np.testing.assert_array_equal(found.read(0, len(value)), value)


@pytest.mark.parametrize('name', made.CONFIGS)
def test_the_settings_come_back_as_they_went(
  name: str, tmp_path: pathlib.Path
) -> None:
  opened = checkpoint.open_checkpoint(made.write(tmp_path / 'theirs', name))
  document = families.write(opened.model, opened.family)
  again, model = families.parse(document, path='config.json')
  assert again is opened.family
  assert model == opened.model


def test_each_device_reads_its_own_slice(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  opened = checkpoint.open_checkpoint(made.write(tmp_path / 'theirs', 'gpt2'))
  monkeypatch.setattr(checkpoint, '_PIECE_BYTES', 64)
  mesh = sharding.make_mesh(sharding.MeshConfig())
  shapes = transformer.abstract_params(opened.model)
  placed = sharding.param_shardings(
    mesh, transformer.logical_axes(opened.model), shapes
  )
  wanted = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    shapes,
    placed,
  )
  read = opened.read(wanted)
  jax.tree.map(np.testing.assert_array_equal, read, opened.read())
  assert jax.tree.map(lambda x: x.sharding, read) == placed


def test_a_slice_of_a_parameter_is_that_of_the_whole(
  tmp_path: pathlib.Path,
) -> None:
  opened = checkpoint.open_checkpoint(made.write(tmp_path / 'theirs', 'gpt2'))
  whole = opened.read()['layers']['attention']['key']['kernel']
  index = (slice(1, 2), slice(4, 8), slice(1, 2), slice(None))
  part = opened._slice('layers/attention/key/kernel', whole.shape, index)
  np.testing.assert_array_equal(part, whole[index])


def _with(name: str, **changes: Any) -> dict[str, np.ndarray]:
  return {**made.weights(name), **changes}


def test_old_names_and_buffers_are_understood(tmp_path: pathlib.Path) -> None:
  tensors = {
    tensor.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
      'LayerNorm.bias', 'LayerNorm.beta'
    ): value
    for tensor, value in made.weights('bert').items()
  }
  tensors |= {
    'bert.embeddings.position_ids': np.arange(16)[None],
    'bert.pooler.dense.weight': np.zeros((8, 8), np.float32),
    'cls.seq_relationship.bias': np.zeros(2, np.float32),
    'cls.predictions.decoder.weight': made.weights('bert')[
      'bert.embeddings.word_embeddings.weight'
    ],
    'cls.predictions.decoder.bias': made.weights('bert')[
      'cls.predictions.bias'
    ],
  }
  wanted = made.logits('bert', made.weights('bert'), _TOKENS)
  folder = made.write(tmp_path / 'theirs', 'bert', tensors)
  np.testing.assert_allclose(_ours(folder), wanted, atol=5e-5, rtol=5e-5)


def test_wrong_tensors_are_named_with_what_is_expected(
  tmp_path: pathlib.Path,
) -> None:
  tensors = _with(
    'qwen2', **{'model.layers.2.mlp.up_proj.weight': np.zeros((12, 8), '<f4')}
  )
  del tensors['model.layers.1.self_attn.k_proj.bias']
  tensors['model.norm.weight'] = np.zeros(9, np.float32)
  tensors['model.layers.0.mlp.up_proj.weight'] = np.zeros((12, 8), np.int64)
  folder = made.write(tmp_path / 'theirs', 'qwen2', tensors)
  with pytest.raises(ValueError) as caught:
    checkpoint.open_checkpoint(folder)
  line = str(caught.value)
  for said in (
    'model.layers.1.self_attn.k_proj.bias [6] is missing',
    "'model.layers.2.mlp.up_proj.weight' [12, 8] is unknown",
    'model.norm.weight is [9], [8] expected',
    'model.layers.0.mlp.up_proj.weight is I64, one of F32, F16, BF16 expected',
  ):
    assert said in line
  assert '\n' not in line


def test_a_tied_head_that_differs_is_refused(tmp_path: pathlib.Path) -> None:
  tensors = _with('qwen3', **{'lm_head.weight': np.zeros((23, 8), '<f4')})
  folder = made.write(tmp_path / 'theirs', 'qwen3', tensors)
  with pytest.raises(ValueError, match='tie_word_embeddings to false'):
    checkpoint.open_checkpoint(folder)


@pytest.mark.parametrize(
  ('name', 'changes', 'said'),
  [
    ('llama', {'model_type': 'mamba'}, "model_type='mamba' must be one of"),
    ('llama', {'rope_scaling': {'rope_type': 'llama3'}}, 'must say factor'),
    (
      'llama',
      {'rope_scaling': {'type': 'linear', 'factor': 2.0}},
      "rope_scaling={'type': 'linear', 'factor': 2.0} must be of rope_type",
    ),
    (
      'llama',
      {'rope_scaling': {**made.STRETCHED, 'low_freq_factor': 4.0}},
      'rotary_low_factor=4.0 must be below',
    ),
    (
      'llama',
      {'rope_scaling': made.STRETCHED, 'rope_parameters': {}},
      'must be as rope_parameters is',
    ),
    ('llama', {'rope_parameters': {'rope_type': 'yarn'}}, 'rope_parameters='),
    ('llama', {'attention_bias': True}, 'attention_bias=True'),
    ('llama', {'quantization_config': {}}, 'quantization_config='),
    ('llama', {'auto_map': {'AutoModel': 'm.M'}}, 'no remote code is run'),
    ('llama', {'hidden_act': 'tanh'}, "hidden_act='tanh' must be one of"),
    ('llama', {'hidden_size': None}, 'must say hidden_size'),
    ('llama', {'hidden_size': 8.0}, 'hidden_size=8.0 must be a whole number'),
    ('llama', {'rms_norm_eps': 0}, 'rms_norm_eps=0 must be a positive'),
    ('llama', {'num_key_value_heads': 3}, 'must be divisible by'),
    ('llama', {'tie_word_embeddings': 1}, 'must be true or false'),
    ('llama', {'architectures': ['LlamaForTokens']}, 'architectures='),
    ('qwen2', {'use_sliding_window': True}, 'use_sliding_window=True'),
    ('qwen3', {'layer_types': ['sliding_attention']}, 'layer_types='),
    ('gpt2', {'scale_attn_weights': False}, 'scale_attn_weights=False'),
    ('bert', {'position_embedding_type': 'relative_key'}, 'absolute'),
    ('bert', {'is_decoder': True}, 'is_decoder=True'),
    ('roberta', {'hidden_act': 'relu'}, "hidden_act='relu'"),
  ],
)
def test_a_model_the_stack_does_not_have_is_refused_by_its_key(
  name: str, changes: Any, said: str, tmp_path: pathlib.Path
) -> None:
  folder = made.write(tmp_path / 'theirs', name, **changes)
  with pytest.raises(ValueError, match=re.escape(said)) as caught:
    checkpoint.open_checkpoint(folder)
  assert '\n' not in str(caught.value)


def test_a_pickle_is_never_read(tmp_path: pathlib.Path) -> None:
  folder = made.write(tmp_path / 'theirs', 'gpt2')
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  with pytest.raises(ValueError, match='a pickle, which could run any code'):
    checkpoint.open_checkpoint(folder)


def test_an_index_must_list_its_files_tensors(tmp_path: pathlib.Path) -> None:
  opened = checkpoint.open_checkpoint(made.write(tmp_path / 'a', 'llama'))
  export.write(
    tmp_path / 'b', opened.model, opened.read(), max_shard_bytes=1500
  )
  index = tmp_path / 'b' / shards.INDEX
  document = json.loads(index.read_text())
  del document['weight_map']['model.norm.weight']
  index.write_text(json.dumps(document))
  with pytest.raises(ValueError, match=r'model\.norm\.weight.* file alone'):
    shards.open_folder(tmp_path / 'b')
  document['weight_map']['model.norm.weight'] = '../a/model.safetensors'
  index.write_text(json.dumps(document))
  with pytest.raises(ValueError, match='of its own folder'):
    shards.open_folder(tmp_path / 'b')


@pytest.mark.parametrize(
  'preset',
  [
    name
    for name, model in presets.PRESETS.items()
    if 'ladder' not in name and not model.reads_images
  ],
)
def test_every_preset_has_a_family(preset: str) -> None:
  config = presets.get(preset)
  if not config.causal and not config.num_token_types:
    config = presets.get(preset, num_token_types=1)
  name = families.choose(config)
  assert name in preset or preset == 'test'


def test_a_model_of_no_family_cannot_be_exported(
  tmp_path: pathlib.Path,
) -> None:
  model = presets.get('test', norm='layer')
  with pytest.raises(ValueError, match=r"model\.norm must be 'rms'"):
    export.write(tmp_path / 'out', model, {})
  assert not (tmp_path / 'out').exists()


def test_bert_without_token_types_exports_a_row_that_adds_nothing(
  tmp_path: pathlib.Path,
) -> None:
  config = architectures.ARCHITECTURES['roberta']
  params = architectures.params('roberta')
  export.write(tmp_path / 'out', config, params)
  opened = checkpoint.open_checkpoint(tmp_path / 'out')
  tokens = architectures.tokens(2, 6)
  # The same sums, one of them with a zero more.
  np.testing.assert_allclose(
    architectures.forward(opened.model, opened.read(), tokens).logits,
    architectures.forward(config, params, tokens).logits,
    atol=1e-5,
  )


def test_what_half_precision_cannot_hold_is_refused(
  tmp_path: pathlib.Path,
) -> None:
  tensors = _with('gpt2', **{'ln_f.bias': np.full(8, 1e6, np.float32)})
  opened = checkpoint.open_checkpoint(
    made.write(tmp_path / 'a', 'gpt2', tensors)
  )
  with pytest.raises(ValueError, match=r'ln_f\.bias holds a number too large'):
    export.write(tmp_path / 'b', opened.model, opened.read(), dtype='float16')


def test_a_file_that_shrinks_while_it_is_read_is_noticed(
  tmp_path: pathlib.Path,
) -> None:
  folder = made.write(tmp_path / 'theirs', 'gpt2')
  opened = checkpoint.open_checkpoint(folder)
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(ValueError, match='as long as when it was opened'):
    opened.read()


def test_dtypes_widen_without_loss() -> None:
  for dtype in safetensors_file.WEIGHT_DTYPES.values():
    assert jnp.promote_types(dtype, jnp.float32) == jnp.float32
