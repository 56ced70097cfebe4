"""Checkpoints against transformers, which writes and reads them too.

Runs only where the extra with PyTorch and transformers is installed.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import transformer
from efficient_llm.models.huggingface import checkpoint, export

torch = pytest.importorskip('torch', reason='needs the extra [hf] and PyTorch')
hf = pytest.importorskip('transformers', reason='needs the extra [hf]')

_BERT = {
  'vocab_size': 61,
  'num_hidden_layers': 2,
  'hidden_size': 16,
  'num_attention_heads': 4,
  'intermediate_size': 24,
}
_LLAMA = {**_BERT, 'num_key_value_heads': 2, 'max_position_embeddings': 32}
_GPT2 = {
  'vocab_size': 61,
  'n_layer': 2,
  'n_embd': 16,
  'n_head': 4,
  'n_positions': 32,
}
# Class, its configuration and settings of it.
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
  'gpt2': ('GPT2LMHeadModel', 'GPT2Config', _GPT2),
  'gpt2_untied': (
    'GPT2LMHeadModel',
    'GPT2Config',
    {**_GPT2, 'n_inner': 40, 'tie_word_embeddings': False},
  ),
  'gpt2_bare': ('GPT2Model', 'GPT2Config', _GPT2),
  'bert': (
    'BertForMaskedLM',
    'BertConfig',
    {**_BERT, 'max_position_embeddings': 32},
  ),
  'bert_pretraining': (
    'BertForPreTraining',
    'BertConfig',
    {**_BERT, 'max_position_embeddings': 32},
  ),
  'roberta': (
    'RobertaForMaskedLM',
    'RobertaConfig',
    {**_BERT, 'max_position_embeddings': 34, 'type_vocab_size': 1},
  ),
  'llama': ('LlamaForCausalLM', 'LlamaConfig', {**_LLAMA, 'head_dim': 6}),
  'llama_3': (
    'LlamaForCausalLM',
    'LlamaConfig',
    {
      **_LLAMA,
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 500_000.0},
      'tie_word_embeddings': True,
      'rms_norm_eps': 1e-5,
    },
  ),
  'llama_3_1': (
    'LlamaForCausalLM',
    'LlamaConfig',
    {
      **_LLAMA,
      # The tokens below go beyond the original eight positions.
      'rope_parameters': {
        'rope_type': 'llama3',
        'rope_theta': 100.0,
        'factor': 4.0,
        'low_freq_factor': 0.2,
        'high_freq_factor': 0.5,
        'original_max_position_embeddings': 8,
      },
    },
  ),
  'llama_biased': (
    'LlamaForCausalLM',
    'LlamaConfig',
    {**_LLAMA, 'attention_bias': True, 'mlp_bias': True},
  ),
  'qwen2': ('Qwen2ForCausalLM', 'Qwen2Config', _LLAMA),
  'qwen3': (
    'Qwen3ForCausalLM',
    'Qwen3Config',
    {**_LLAMA, 'head_dim': 6, 'tie_word_embeddings': True},
  ),
}


def _save(name: str, folder: pathlib.Path, **how: Any) -> Any:
  """A random model, its norms and biases too, written by transformers."""
  model_class, config_class, settings = _MODELS[name]
  torch.manual_seed(0)
  config = getattr(hf, config_class)(**settings)
  model = getattr(hf, model_class)(config).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight.add_(0.2 * torch.randn(weight.shape))
  model.to(how.pop('dtype', torch.float32)).save_pretrained(folder, **how)
  return model.float()


def _tokens() -> np.ndarray:
  # Not RoBERTa's padding token, which has a position of its own.
  return np.random.default_rng(0).integers(2, 61, (3, 20), np.int32)


def _theirs(model: Any) -> np.ndarray:
  with torch.no_grad():
    output = model(torch.tensor(_tokens()).long())
  if hasattr(output, 'prediction_logits'):
    return output.prediction_logits.numpy()
  if hasattr(output, 'logits'):
    return output.logits.numpy()
  return output.last_hidden_state.numpy()


def _ours(folder: pathlib.Path, *, hidden: bool = False) -> np.ndarray:
  opened = checkpoint.open_checkpoint(folder)
  output = transformer.apply(
    opened.model, jax.device_put(opened.read()), jnp.asarray(_tokens())
  )
  return np.asarray(output.hidden if hidden else output.logits)


@pytest.mark.parametrize('name', _MODELS)
def test_an_imported_model_says_the_same(
  name: str, tmp_path: pathlib.Path
) -> None:
  model = _save(name, tmp_path / 'theirs', max_shard_size='8KB')
  theirs = _theirs(model)
  ours = _ours(tmp_path / 'theirs', hidden=name == 'gpt2_bare')
  # Float32 sums of another order.
  np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-5)
  assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize('name', _MODELS)
def test_transformers_loads_an_export_with_the_same_bits(
  name: str, tmp_path: pathlib.Path
) -> None:
  model = _save(name, tmp_path / 'theirs')
  opened = checkpoint.open_checkpoint(tmp_path / 'theirs')
  export.write(
    tmp_path / 'ours', opened.model, opened.read(), max_shard_bytes=8_000
  )
  model_class = _MODELS[name][0].replace('ForPreTraining', 'ForMaskedLM')
  if name == 'gpt2_bare':
    model_class = 'GPT2LMHeadModel'
  again, info = getattr(hf, model_class).from_pretrained(
    tmp_path / 'ours', output_loading_info=True, dtype=torch.float32
  )
  assert not info['missing_keys'] and not info['unexpected_keys']
  before = model.state_dict()
  prefix = 'transformer.' if name == 'gpt2_bare' else ''
  after = {
    key.removeprefix(prefix): value
    for key, value in again.state_dict().items()
    if (prefix and key.startswith(prefix)) or not prefix
  }
  lost = set(before) - set(after)
  assert all('pooler' in key or 'seq_relationship' in key for key in lost)
  for key, value in after.items():
    assert torch.equal(value, before[key]), key


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_comes_and_goes_with_the_same_bits(
  dtype: Any, tmp_path: pathlib.Path
) -> None:
  _save('qwen2', tmp_path / 'theirs', dtype=getattr(torch, dtype))
  opened = checkpoint.open_checkpoint(tmp_path / 'theirs')
  export.write(tmp_path / 'ours', opened.model, opened.read(), dtype=dtype)
  first, second = (
    hf.Qwen2ForCausalLM.from_pretrained(tmp_path / one, dtype='auto')
    for one in ('theirs', 'ours')
  )
  assert second.dtype == getattr(torch, dtype)
  after = second.state_dict()
  for key, value in first.state_dict().items():
    assert torch.equal(value, after[key]), key
