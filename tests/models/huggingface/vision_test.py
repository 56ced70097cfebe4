"""DeiT and CaiT in timm's names, against plain numpy and, where it is, timm."""

import json
import math
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm.models import presets, transformer
from efficient_llm.models.huggingface import (
  checkpoint,
  export,
  families,
  shards,
  verify,
)
from efficient_llm.training import interchange, trained_run
from tests.models.huggingface import made

_SIZES = {
  'img_size': [8, 8],
  'patch_size': 4,
  'embed_dim': 8,
  'depth': 2,
  'num_heads': 2,
  'mlp_ratio': 1.5,
}
_CONFIGS: dict[str, dict[str, Any]] = {
  'deit': {
    'architecture': 'deit_tiny_patch16_224',
    'num_classes': 5,
    'model_args': {**_SIZES, 'global_pool': 'token', 'drop_rate': 0.1},
  },
  'cait': {
    'architecture': 'cait_xxs24_224',
    'num_classes': 5,
    'model_args': {**_SIZES, 'mlp_ratio_token_only': 1.5},
    'pretrained_cfg': {'mean': [0.5] * 3, 'std': [0.5] * 3},
  },
}
_NORMS = {
  'deit': ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
  'cait': ([0.5] * 3, [0.5] * 3),
}
each_family = pytest.mark.parametrize('name', _CONFIGS)


def _shapes(name: str) -> dict[str, tuple[int, ...]]:
  shapes: dict[str, tuple[int, ...]] = {
    'cls_token': (1, 1, 8),
    'pos_embed': (1, 4 + (name == 'deit'), 8),
    'patch_embed.proj.weight': (8, 3, 4, 4),
    'patch_embed.proj.bias': (8,),
  }
  linears = {'head': (5, 8)}
  norms = ['norm']
  for stack in ('blocks', *['blocks_token_only'] * (name == 'cait')):
    for layer in range(2):
      h = f'{stack}.{layer}.'
      linears |= {f'{h}attn.proj': (8, 8)}
      linears |= {f'{h}mlp.fc1': (12, 8), f'{h}mlp.fc2': (8, 12)}
      norms += [f'{h}norm1', f'{h}norm2']
      if name == 'cait':
        shapes |= {f'{h}gamma_1': (8,), f'{h}gamma_2': (8,)}
      if stack == 'blocks':
        linears |= {f'{h}attn.qkv': (24, 8)}
        if name == 'cait':
          linears |= {f'{h}attn.proj_l': (2, 2), f'{h}attn.proj_w': (2, 2)}
      else:
        linears |= {f'{h}attn.{part}': (8, 8) for part in 'qkv'}
  for linear, shape in linears.items():
    shapes |= {f'{linear}.weight': shape, f'{linear}.bias': shape[:1]}
  for norm in norms:
    shapes |= {f'{norm}.weight': (8,), f'{norm}.bias': (8,)}
  return shapes


def _weights(name: str) -> dict[str, np.ndarray]:
  weights = {}
  for number, (tensor, shape) in enumerate(_shapes(name).items()):
    count = np.arange(math.prod(shape), dtype=np.float64)
    value = 0.5 * np.sin(count * 0.7 + number) + 0.1 * np.cos(count * 0.13)
    weights[tensor] = value.reshape(shape).astype(np.float32)
  return weights


def _write(folder: pathlib.Path, name: str, **changes: Any) -> pathlib.Path:
  folder.mkdir(parents=True)
  (folder / 'model.safetensors').write_bytes(made.pack(_weights(name)))
  document = {**_CONFIGS[name], **changes}
  (folder / 'config.json').write_text(json.dumps(document))
  return folder


def _logits(name: str, image_YXC: np.ndarray) -> np.ndarray:
  """What timm's model computes of an image's bytes, in float64."""
  w = {key: value.astype(np.float64) for key, value in _weights(name).items()}

  def linear(tensor: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f'{tensor}.weight'].T + w[f'{tensor}.bias']

  def normed(tensor: str, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * w[f'{tensor}.weight'] + w[f'{tensor}.bias']

  def attend(q: Any, k: Any, v: Any, h: str, *, talks: bool) -> np.ndarray:
    q, k, v = (x.reshape(len(x), 2, 4) for x in (q, k, v))
    scores = np.einsum('tnh,snh->tsn', q, k) / 2
    if talks:
      scores = linear(f'{h}attn.proj_l', scores)
    share = np.exp(scores - scores.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    if talks:
      share = linear(f'{h}attn.proj_w', share)
    y = np.einsum('tsn,snh->tnh', share, v).reshape(len(q), 8)
    return linear(f'{h}attn.proj', y)

  def add(x: np.ndarray, h: str, y: np.ndarray) -> np.ndarray:
    x = x + y * w.get(f'{h}gamma_1', 1.0)
    up = linear(f'{h}mlp.fc1', normed(f'{h}norm2', x))
    up *= 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
    return x + linear(f'{h}mlp.fc2', up) * w.get(f'{h}gamma_2', 1.0)

  mean, deviation = _NORMS[name]
  pixels = (image_YXC / 255 - mean) / deviation
  kernel = w['patch_embed.proj.weight']
  x = np.stack(
    [
      np.einsum('yxc,dcyx->d', pixels[top : top + 4, left : left + 4], kernel)
      for top in (0, 4)
      for left in (0, 4)
    ]
  )
  x = x + w['patch_embed.proj.bias']
  if name == 'deit':
    x = np.concatenate([w['cls_token'][0], x])
  x = x + w['pos_embed'][0]
  for layer in range(2):
    h = f'blocks.{layer}.'
    q, k, v = np.split(linear(f'{h}attn.qkv', normed(f'{h}norm1', x)), 3, -1)
    x = add(x, h, attend(q, k, v, h, talks=name == 'cait'))
  if name == 'cait':
    cls = w['cls_token'][0]
    for layer in range(2):
      h = f'blocks_token_only.{layer}.'
      both = normed(f'{h}norm1', np.concatenate([cls, x]))
      q = linear(f'{h}attn.q', both[:1])
      k, v = (linear(f'{h}attn.{part}', both) for part in 'kv')
      cls = add(cls, h, attend(q, k, v, h, talks=False))
    x = cls
  return linear('head', normed('norm', x[:1]))[0]


@each_family
def test_logits_are_those_of_plain_numpy(
  name: str, tmp_path: pathlib.Path
) -> None:
  opened = checkpoint.open_checkpoint(_write(tmp_path / 'theirs', name))
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  apply = jax.jit(transformer.apply, static_argnums=0)
  logits = apply(opened.model, opened.read(), image[None]).logits
  # Float32 against float64, through sums of a dozen terms.
  np.testing.assert_allclose(
    logits[0, 0], _logits(name, image), atol=5e-5, rtol=5e-5
  )


@each_family
def test_there_and_back_leaves_every_bit(
  name: str, tmp_path: pathlib.Path
) -> None:
  theirs = _write(tmp_path / 'theirs', name)
  run = interchange.import_run(f'hf:{theirs}', tmp_path / 'run')
  assert not run.has_tokenizer
  interchange.export_run(run, tmp_path / 'back')
  stored = shards.open_folder(tmp_path / 'back')
  weights = _weights(name)
  assert set(stored) == set(weights)
  for tensor, value in weights.items():
    found = stored[tensor]
    assert found.shape == value.shape
    np.testing.assert_array_equal(found.read(0, len(value)), value)
  again = trained_run.find(f'hf:{tmp_path / "back"}', name='checkpoint')
  assert again.model == run.model


def test_pixels_are_not_cut(tmp_path: pathlib.Path) -> None:
  opened = checkpoint.open_checkpoint(_write(tmp_path / 'theirs', 'deit'))
  kernel = opened.read()['embedding']['patches']['kernel']
  path = 'embedding/patches/kernel'
  part = opened._slice(path, kernel.shape, (slice(None), slice(2, 5)))
  np.testing.assert_array_equal(part, kernel[:, 2:5])
  with pytest.raises(ValueError, match='must not be sharded by pixels'):
    opened._slice(path, kernel.shape, (slice(0, 24), slice(None)))


@pytest.mark.parametrize(
  ('name', 'changes', 'said'),
  [
    ('deit', {'architecture': 'deit3_small_patch16_224'}, 'architecture='),
    (
      'deit',
      {'architecture': 'deit_tiny_distilled_patch16_224'},
      "architecture='deit_tiny_distilled_patch16_224' must be one of",
    ),
    ('deit', {'architecture': None, 'model_type': 'deit'}, "one of timm's"),
    ('deit', {'architecture': 'resnet50'}, "'resnet50' must be one of"),
    ('deit', {'model_args': {'global_pool': 'avg'}}, "global_pool='avg'"),
    ('deit', {'model_args': {'init_values': 1e-5}}, 'init_values=1e-05'),
    ('deit', {'model_args': {'img_size': [8, 4]}}, 'img_size=[8, 4]'),
    ('cait', {'model_args': {'mlp_ratio': 2}}, 'mlp_ratio_token_only='),
    ('deit', {'pretrained_cfg': {'mean': [0, 0, 0]}}, 'pretrained_cfg='),
    ('deit', {'model_args': {}}, 'blocks.2.norm1.weight [192] is missing'),
  ],
)
def test_what_our_stack_does_not_have_is_refused_by_its_key(
  name: str, changes: Any, said: str, tmp_path: pathlib.Path
) -> None:
  folder = _write(tmp_path / 'theirs', name, **changes)
  with pytest.raises(ValueError, match=re.escape(said)) as caught:
    checkpoint.open_checkpoint(folder)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'preset', ['deit_small', 'deit_base', 'cait_xs24', 'cait_s24', 'cait_digits']
)
def test_every_preset_of_images_has_a_family(preset: str) -> None:
  config = presets.get(preset)
  assert families.choose(config) == preset.partition('_')[0]


def test_a_stack_that_timm_does_not_have_is_not_exported(
  tmp_path: pathlib.Path,
) -> None:
  model = presets.get('deit_small', talking_heads=True)
  with pytest.raises(ValueError, match=r'model\.talking_heads must be False'):
    export.write(tmp_path / 'out', model, {})
  model = presets.get('deit_small', num_kv_heads=2)
  with pytest.raises(ValueError, match='axis kv_heads must be 6 long'):
    export.write(tmp_path / 'out', model, {})


@each_family
def test_timm_says_the_same_and_loads_an_export_with_the_same_bits(
  name: str, tmp_path: pathlib.Path
) -> None:
  torch = pytest.importorskip('torch', reason='needs the extra [timm]')
  timm = pytest.importorskip('timm', reason='needs the extra [timm]')
  theirs = _write(tmp_path / 'theirs', name)
  run = trained_run.find(f'hf:{theirs}', name='checkpoint')
  interchange.export_run(run, tmp_path / 'ours')
  found = verify.compare(run.model, run.restore_params(None), theirs)
  # Float32 sums of another order.
  assert found.max_abs_logit_diff < 2e-5 and found.top1_agreement == 1
  before = verify.load_peer(theirs).state_dict()
  after = timm.create_model(
    f'local-dir:{tmp_path / "ours"}', pretrained=True
  ).state_dict()
  assert set(before) == set(after)
  assert all(torch.equal(value, after[key]) for key, value in before.items())
