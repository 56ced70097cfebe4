"""Tiny checkpoints in the names of each family, and what they must say.

Over 300 lines: six families, with shapes and a forward pass of each.

Files are packed by hand and the forward passes are plain numpy in float64, so
that neither the code under test nor PyTorch has a part in them.
"""

import json
import math
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

_ENCODER = {
  'vocab_size': 23,
  'num_hidden_layers': 2,
  'hidden_size': 8,
  'num_attention_heads': 2,
  'intermediate_size': 12,
  'hidden_act': 'gelu',
  'layer_norm_eps': 1e-5,
}
_DECODER = {
  'vocab_size': 23,
  'num_hidden_layers': 2,
  'hidden_size': 8,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
  'head_dim': 6,
  'intermediate_size': 12,
  'max_position_embeddings': 16,
  'rms_norm_eps': 1e-5,
  'rope_theta': 100.0,
  'hidden_act': 'silu',
}
# Long waves of these few tokens.
STRETCHED = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 0.2,
  'high_freq_factor': 0.5,
  'original_max_position_embeddings': 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
  'gpt2': {
    'model_type': 'gpt2',
    'vocab_size': 23,
    'n_layer': 2,
    'n_embd': 8,
    'n_head': 2,
    'n_positions': 16,
    'n_inner': None,
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': 1e-5,
  },
  'bert': {
    **_ENCODER,
    'model_type': 'bert',
    'max_position_embeddings': 16,
    'type_vocab_size': 2,
  },
  'roberta': {
    **_ENCODER,
    'model_type': 'roberta',
    'max_position_embeddings': 18,
    'type_vocab_size': 1,
    'pad_token_id': 1,
  },
  'llama': {**_DECODER, 'model_type': 'llama'},
  'qwen2': {**_DECODER, 'model_type': 'qwen2', 'tie_word_embeddings': True},
  'qwen3': {**_DECODER, 'model_type': 'qwen3', 'tie_word_embeddings': True},
}


def weights(name: str) -> dict[str, np.ndarray]:
  """Every tensor of a family's model, by a formula."""
  made = {}
  for number, (tensor, shape) in enumerate(_shapes(name).items()):
    count = np.arange(math.prod(shape), dtype=np.float64)
    value = 0.5 * np.sin(count * 0.7 + number) + 0.1 * np.cos(count * 0.13)
    is_scale = 'norm' in tensor.lower() or '.ln_' in tensor
    if is_scale and tensor.endswith('weight'):
      value += 1
    made[tensor] = value.reshape(shape).astype(np.float32)
  return made


def _shapes(name: str) -> dict[str, tuple[int, ...]]:
  if name == 'gpt2':
    return _gpt2_shapes()
  if name in ('bert', 'roberta'):
    return _encoder_shapes(name)
  return _decoder_shapes(name)


def _gpt2_shapes() -> dict[str, tuple[int, ...]]:
  shapes: dict[str, tuple[int, ...]] = {'wte.weight': (23, 8)}
  shapes |= {'wpe.weight': (16, 8), 'ln_f.weight': (8,), 'ln_f.bias': (8,)}
  for layer in range(2):
    h = f'h.{layer}.'
    shapes |= {f'{h}ln_1.weight': (8,), f'{h}ln_1.bias': (8,)}
    shapes |= {f'{h}ln_2.weight': (8,), f'{h}ln_2.bias': (8,)}
    for matrix, shape in (
      ('attn.c_attn', (8, 24)),
      ('attn.c_proj', (8, 8)),
      ('mlp.c_fc', (8, 32)),
      ('mlp.c_proj', (32, 8)),
    ):
      shapes |= {f'{h}{matrix}.weight': shape, f'{h}{matrix}.bias': shape[1:]}
  return shapes


def _encoder_shapes(name: str) -> dict[str, tuple[int, ...]]:
  config = CONFIGS[name]
  e = f'{name}.embeddings.'
  shapes: dict[str, tuple[int, ...]] = {
    f'{e}word_embeddings.weight': (23, 8),
    f'{e}position_embeddings.weight': (config['max_position_embeddings'], 8),
    f'{e}token_type_embeddings.weight': (config['type_vocab_size'], 8),
  }
  linears: dict[str, tuple[int, int]] = {}
  norms = [f'{e}LayerNorm']
  for layer in range(2):
    h = f'{name}.encoder.layer.{layer}.'
    for part in ('query', 'key', 'value'):
      linears[f'{h}attention.self.{part}'] = (8, 8)
    linears[f'{h}attention.output.dense'] = (8, 8)
    linears[f'{h}intermediate.dense'] = (12, 8)
    linears[f'{h}output.dense'] = (8, 12)
    norms += [f'{h}attention.output.LayerNorm', f'{h}output.LayerNorm']
  if name == 'bert':
    linears['cls.predictions.transform.dense'] = (8, 8)
    norms.append('cls.predictions.transform.LayerNorm')
    shapes['cls.predictions.bias'] = (23,)
  else:
    linears['lm_head.dense'] = (8, 8)
    norms.append('lm_head.layer_norm')
    shapes['lm_head.bias'] = (23,)
  for linear, shape in linears.items():
    shapes |= {f'{linear}.weight': shape, f'{linear}.bias': shape[:1]}
  for norm in norms:
    shapes |= {f'{norm}.weight': (8,), f'{norm}.bias': (8,)}
  return shapes


def _decoder_shapes(name: str) -> dict[str, tuple[int, ...]]:
  shapes: dict[str, tuple[int, ...]] = {
    'model.embed_tokens.weight': (23, 8),
    'model.norm.weight': (8,),
  }
  if name == 'llama':
    shapes['lm_head.weight'] = (23, 8)
  for layer in range(2):
    h = f'model.layers.{layer}.'
    for part, rows in (('q', 12), ('k', 6), ('v', 6)):
      shapes[f'{h}self_attn.{part}_proj.weight'] = (rows, 8)
      if name == 'qwen2':
        shapes[f'{h}self_attn.{part}_proj.bias'] = (rows,)
    if name == 'qwen3':
      shapes[f'{h}self_attn.q_norm.weight'] = (6,)
      shapes[f'{h}self_attn.k_norm.weight'] = (6,)
    shapes[f'{h}self_attn.o_proj.weight'] = (8, 12)
    shapes[f'{h}mlp.gate_proj.weight'] = (12, 8)
    shapes[f'{h}mlp.up_proj.weight'] = (12, 8)
    shapes[f'{h}mlp.down_proj.weight'] = (8, 12)
    shapes[f'{h}input_layernorm.weight'] = (8,)
    shapes[f'{h}post_attention_layernorm.weight'] = (8,)
  return shapes


def pack(tensors: Mapping[str, np.ndarray]) -> bytes:
  """The bytes of a safetensors file."""
  names = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}
  header: dict[str, Any] = {}
  data = b''
  for name, value in tensors.items():
    start, data = len(data), data + value.tobytes()
    header[name] = {
      'dtype': names.get(value.dtype.name, 'I64'),
      'shape': list(value.shape),
      'data_offsets': [start, len(data)],
    }
  text = json.dumps(header).encode()
  return struct.pack('<Q', len(text)) + text + data


def write(
  folder: pathlib.Path,
  name: str,
  tensors: Mapping[str, np.ndarray] | None = None,
  **changes: Any,
) -> pathlib.Path:
  """Writes a checkpoint of one file.

  Args:
    folder: New.
    name: Of a family.
    tensors: Those of `weights` where None.
    **changes: Keys of config.json.
  """
  folder.mkdir(parents=True)
  found = weights(name) if tensors is None else tensors
  (folder / 'model.safetensors').write_bytes(pack(found))
  document = {**CONFIGS[name], **changes}
  (folder / 'config.json').write_text(json.dumps(document))
  return folder


def bfloat16(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same, rounded."""
  return {
    name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()
  }


def logits(
  name: str,
  tensors: Mapping[str, np.ndarray],
  tokens_T: np.ndarray,
  *,
  stretched: bool = False,
) -> np.ndarray:
  """What the model of a family says of one sequence, [T, V]."""
  w = {key: np.asarray(value, np.float64) for key, value in tensors.items()}
  if name == 'gpt2':
    return _gpt2(w, tokens_T)
  if name in ('bert', 'roberta'):
    return _encoder(name, w, tokens_T)
  return _decoder(name, w, tokens_T, stretched=stretched)


def _layer_norm(w: Any, name: str, x: np.ndarray) -> np.ndarray:
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  return x * w[f'{name}.weight'] + w[f'{name}.bias']


def _rms_norm(w: Any, name: str, x: np.ndarray) -> np.ndarray:
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  return x * w[f'{name}.weight']


def _gelu(x: np.ndarray) -> np.ndarray:
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _attend(
  q_TNH: np.ndarray, k_TKH: np.ndarray, v_TKH: np.ndarray, *, causal: bool
) -> np.ndarray:
  """Head by head; [T, N * H]."""
  num_tokens, num_heads, head_dim = q_TNH.shape
  group = num_heads // k_TKH.shape[1]
  heads = []
  for head in range(num_heads):
    k_TH, v_TH = k_TKH[:, head // group], v_TKH[:, head // group]
    scores = q_TNH[:, head] @ k_TH.T / math.sqrt(head_dim)
    if causal:
      scores[np.triu_indices(num_tokens, 1)] = -np.inf
    share = np.exp(scores - scores.max(-1, keepdims=True))
    heads.append(share / share.sum(-1, keepdims=True) @ v_TH)
  return np.concatenate(heads, -1)


def _gpt2(w: Any, tokens_T: np.ndarray) -> np.ndarray:
  x = w['wte.weight'][tokens_T] + w['wpe.weight'][: len(tokens_T)]
  for layer in range(2):
    h = f'h.{layer}.'

    def conv(name: str, x: np.ndarray, h: str = h) -> np.ndarray:
      return x @ w[f'{h}{name}.weight'] + w[f'{h}{name}.bias']

    qkv = conv('attn.c_attn', _layer_norm(w, f'{h}ln_1', x))
    q, k, v = (part.reshape(-1, 2, 4) for part in np.split(qkv, 3, -1))
    x = x + conv('attn.c_proj', _attend(q, k, v, causal=True))
    up = conv('mlp.c_fc', _layer_norm(w, f'{h}ln_2', x))
    inner = math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)
    x = x + conv('mlp.c_proj', 0.5 * up * (1 + np.tanh(inner)))
  return _layer_norm(w, 'ln_f', x) @ w['wte.weight'].T


def _encoder(name: str, w: Any, tokens_T: np.ndarray) -> np.ndarray:
  def linear(tensor: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f'{tensor}.weight'].T + w[f'{tensor}.bias']

  e, first = f'{name}.embeddings.', 2 if name == 'roberta' else 0
  words = w[f'{e}word_embeddings.weight']
  rows = slice(first, first + len(tokens_T))
  x = words[tokens_T] + w[f'{e}position_embeddings.weight'][rows]
  x = _layer_norm(
    w, f'{e}LayerNorm', x + w[f'{e}token_type_embeddings.weight'][0]
  )
  for layer in range(2):
    h = f'{name}.encoder.layer.{layer}.'
    q, k, v = (
      linear(f'{h}attention.self.{part}', x).reshape(-1, 2, 4)
      for part in ('query', 'key', 'value')
    )
    y = linear(f'{h}attention.output.dense', _attend(q, k, v, causal=False))
    x = _layer_norm(w, f'{h}attention.output.LayerNorm', x + y)
    y = _gelu(linear(f'{h}intermediate.dense', x))
    y = linear(f'{h}output.dense', y)
    x = _layer_norm(w, f'{h}output.LayerNorm', x + y)
  if name == 'bert':
    x = _gelu(linear('cls.predictions.transform.dense', x))
    x = _layer_norm(w, 'cls.predictions.transform.LayerNorm', x)
    return x @ words.T + w['cls.predictions.bias']
  x = _layer_norm(w, 'lm_head.layer_norm', _gelu(linear('lm_head.dense', x)))
  return x @ words.T + w['lm_head.bias']


def _rotate(x_TNH: np.ndarray, *, stretched: bool) -> np.ndarray:
  half = x_TNH.shape[-1] // 2
  rates = 100.0 ** (-np.arange(half) / half)
  for i in range(half if stretched else 0):
    waves = 4 * rates[i] / (2 * math.pi)
    if waves < 0.2:
      rates[i] /= 8.0
    elif waves < 0.5:
      smooth = (waves - 0.2) / 0.3
      rates[i] = (1 - smooth) * rates[i] / 8.0 + smooth * rates[i]
  angles = np.arange(len(x_TNH))[:, None] * rates
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
  a, b = x_TNH[..., :half], x_TNH[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _decoder(
  name: str, w: Any, tokens_T: np.ndarray, *, stretched: bool
) -> np.ndarray:
  x = w['model.embed_tokens.weight'][tokens_T]
  for layer in range(2):
    h = f'model.layers.{layer}.'
    y = _rms_norm(w, f'{h}input_layernorm', x)
    heads = []
    for part in 'qkv':
      tensor = f'{h}self_attn.{part}_proj'
      z = y @ w[f'{tensor}.weight'].T
      if name == 'qwen2':
        z = z + w[f'{tensor}.bias']
      z = z.reshape(len(tokens_T), -1, 6)
      if name == 'qwen3' and part != 'v':
        z = _rms_norm(w, f'{h}self_attn.{part}_norm', z)
      heads.append(z if part == 'v' else _rotate(z, stretched=stretched))
    y = _attend(heads[0], heads[1], heads[2], causal=True)
    x = x + y @ w[f'{h}self_attn.o_proj.weight'].T
    y = _rms_norm(w, f'{h}post_attention_layernorm', x)
    gate = y @ w[f'{h}mlp.gate_proj.weight'].T
    y = gate / (1 + np.exp(-gate)) * (y @ w[f'{h}mlp.up_proj.weight'].T)
    x = x + y @ w[f'{h}mlp.down_proj.weight'].T
  head = 'lm_head.weight' if name == 'llama' else 'model.embed_tokens.weight'
  return _rms_norm(w, 'model.norm', x) @ w[head].T
