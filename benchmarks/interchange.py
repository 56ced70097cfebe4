"""Checkpoints of transformers in and out: logits, bits, tokens, memory.

    ./run.sh pip install torch==2.15.0 'transformers>=5,<6' 'timm>=1.0.20,<2'
    ./run.sh python -m benchmarks.interchange

Models with random weights, written by transformers' own save_pretrained or
timm's: of every family a small one, and one layer of a published model's real
width. Each is imported and compared, exported and loaded by the other library
again.

Over 300 lines: the models compared are a table of their own.
"""

import argparse
import functools
import importlib
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from efficient_llm import sharding
from efficient_llm.ligo import methods
from efficient_llm.ligo import operator as operator_lib
from efficient_llm.models import presets, sampling, transformer
from efficient_llm.models.huggingface import (
  checkpoint,
  export,
  families,
  shards,
  verify,
)
from efficient_llm.models.huggingface import family as family_lib
from efficient_llm.training import interchange, trained_run

_SMALL = {
  'gpt2': presets.get(
    'gpt2', vocab_size=997, num_layers=3, embed_dim=64, num_heads=4
  ),
  'bert': presets.get(
    'bert_base', vocab_size=997, num_layers=3, embed_dim=64, num_heads=4
  ),
  'roberta': presets.get(
    'roberta_base',
    vocab_size=997,
    num_layers=3,
    embed_dim=64,
    num_heads=4,
    num_token_types=1,
    position_offset=2,
  ),
  'llama': presets.get(
    'llama_350m',
    vocab_size=997,
    num_layers=3,
    embed_dim=64,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=160,
  ),
  'qwen2': presets.get(
    'qwen3_600m',
    vocab_size=997,
    num_layers=3,
    embed_dim=64,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=160,
    head_dim=16,
    qk_norm=False,
    qkv_bias=True,
  ),
  'qwen3': presets.get(
    'qwen3_600m',
    vocab_size=997,
    num_layers=3,
    embed_dim=64,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=160,
    head_dim=32,
  ),
}
# Images of few patches; as published ones, less the mean of their colours.
_SMALL_IMAGES = {
  'num_layers': 3,
  'embed_dim': 64,
  'num_heads': 4,
  'patch_size': 8,
  'image_size': 64,
  'image_norm': 'imagenet',
}
_SMALL |= {
  'deit': presets.get('deit_small', **_SMALL_IMAGES),
  'cait': presets.get('cait_s24', **_SMALL_IMAGES, layer_scale=0.1),
}
# One layer of a published width; Qwen2.5 0.5B's as its config.json has it.
_WIDE = {
  'gpt2': presets.get('gpt2', num_layers=1),
  'bert': presets.get('bert_base', num_layers=1),
  'roberta': presets.get(
    'roberta_base', num_layers=1, num_token_types=1, position_offset=2
  ),
  'llama': presets.get(
    'llama_8b', num_layers=1, vocab_size=2048, rotary_original_positions=256
  ),
  'qwen2': presets.get(
    'qwen3_600m',
    num_layers=1,
    embed_dim=896,
    num_heads=14,
    num_kv_heads=2,
    mlp_dim=4864,
    head_dim=64,
    vocab_size=8192,
    qk_norm=False,
    qkv_bias=True,
  ),
  'qwen3': presets.get('qwen3_600m', num_layers=1, vocab_size=8192),
  'deit': presets.get('deit_base', num_layers=1, image_norm='imagenet'),
  'cait': presets.get('cait_s24', num_layers=1, image_norm='imagenet'),
}
_DECODERS = ('gpt2', 'llama', 'qwen2', 'qwen3')
_NUM_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 20, 12, 32


def make_peer(
  family: str, config: transformer.TransformerConfig, folder: pathlib.Path
) -> None:
  """Writes a random model of transformers, its norms and biases random too.

  Args:
    family: As config.json spells it.
    config: Its sizes.
    folder: Where to.
  """
  torch, library = (
    importlib.import_module(name) for name in ('torch', 'transformers')
  )
  of = families.FAMILIES[family]
  torch.manual_seed(0)
  if of.library == 'timm':
    _make_timm_peer(config, of, folder)
    return
  settings = families.write(config, of)
  for name in ('architectures', 'dtype', 'torch_dtype', 'model_type'):
    del settings[name]
  none = {f'{name}_token_id': None for name in ('bos', 'eos')}
  hf_config = library.AutoConfig.for_model(family, **settings, **none)
  model = getattr(library, of.architectures[0])(hf_config)
  with torch.no_grad():
    for weight in model.parameters():
      weight.add_(0.02 * torch.randn(weight.shape))
  model.save_pretrained(folder, max_shard_size='200MB')


def _make_timm_peer(
  config: transformer.TransformerConfig,
  of: family_lib.Family,
  folder: pathlib.Path,
) -> None:
  torch, timm, hub = (
    importlib.import_module(name)
    for name in ('torch', 'timm', 'timm.models._hub')
  )
  document = families.write(config, of)
  model = timm.create_model(document['architecture'], **document['model_args'])
  with torch.no_grad():
    for weight in model.parameters():
      weight.add_(0.02 * torch.randn(weight.shape))
  hub.save_for_hf(model, folder, safe_serialization=True)


def there_and_back(
  family: str, config: transformer.TransformerConfig, folder: pathlib.Path
) -> dict[str, Any]:
  """Imports, compares, exports, compares again.

  Args:
    family: As config.json spells it.
    config: Sizes of the model.
    folder: For its files.
  """
  theirs, ours = folder / 'theirs', folder / 'ours'
  make_peer(family, config, theirs)
  run = trained_run.find(f'hf:{theirs}', name='from')
  params = jax.device_put(run.restore_params(None))
  num_tokens = 64
  if run.model.rotary_factor is not None:
    # Beyond the texts from which the positions are stretched.
    num_tokens = 2 * run.model.rotary_original_positions
  compare = functools.partial(verify.compare, num_tokens=num_tokens)
  imported = compare(run.model, params, theirs)
  interchange.export_run(run, ours)
  exported = compare(run.model, params, ours)
  found: dict[str, Any] = {
    'num_params': transformer.num_params(run.model),
    'max_abs_logit_diff': max(
      imported.max_abs_logit_diff, exported.max_abs_logit_diff
    ),
    'max_abs_logit': imported.max_abs_logit,
    'top1_agreement': min(imported.top1_agreement, exported.top1_agreement),
    'roundtrip_bit_exact': _same_state(theirs, ours),
  }
  if family in _DECODERS and config.num_layers > 1:
    found['generation_identical_prompts'] = _same_answers(
      run.model, params, theirs
    )
    found['num_prompts'] = _NUM_PROMPTS
  return found


def _same_state(one: pathlib.Path, other: pathlib.Path) -> bool:
  """Whether transformers loads the same bits from both."""
  torch = importlib.import_module('torch')
  first, second = (
    verify.load_peer(folder).state_dict() for folder in (one, other)
  )
  return set(first) == set(second) and all(
    torch.equal(value, second[name]) for name, value in first.items()
  )


def _same_answers(
  config: transformer.TransformerConfig, params: Any, folder: pathlib.Path
) -> int:
  """Prompts that both complete with the same tokens, greedily."""
  torch = importlib.import_module('torch')
  rng = np.random.default_rng(1)
  prompts = rng.integers(
    4, config.vocab_size, (_NUM_PROMPTS, _PROMPT_TOKENS), np.int32
  )
  model = verify.load_peer(folder)
  tokens = torch.tensor(prompts, dtype=torch.long)
  with torch.inference_mode():
    theirs = model.generate(
      tokens,
      attention_mask=torch.ones_like(tokens),
      max_new_tokens=_NEW_TOKENS,
      do_sample=False,
      pad_token_id=0,
      eos_token_id=None,
    ).numpy()[:, _PROMPT_TOKENS:]
  greedy = sampling.SamplingConfig(max_new_tokens=_NEW_TOKENS, temperature=0.0)
  lengths = jnp.full(_NUM_PROMPTS, _PROMPT_TOKENS, jnp.int32)
  ours = sampling.generate(
    config, params, jnp.asarray(prompts), lengths, greedy, jax.random.key(0)
  )
  return int(np.equal(np.asarray(ours.tokens), theirs).all(-1).sum())


def grow(folder: pathlib.Path) -> dict[str, Any]:
  """GPT-2's shape from transformers, grown to Medium's, and handed back.

  Args:
    folder: For the files.
  """
  small = presets.get('gpt2')
  make_peer('gpt2', small, folder / 'theirs')
  run = trained_run.find(f'hf:{folder / "theirs"}', name='from')
  large = presets.get('gpt2_medium')
  operator = methods.build(methods.get('stack'), run.model, large, seed=0)
  params = operator_lib.grow(run.model, run.restore_params(None), operator)
  export.write(folder / 'grown', large, params)
  found = verify.compare(large, params, folder / 'grown')
  return {
    'num_params': transformer.num_params(large),
    'max_abs_logit_diff': found.max_abs_logit_diff,
    'max_abs_logit': found.max_abs_logit,
    'top1_agreement': found.top1_agreement,
  }


def write_large(folder: pathlib.Path) -> None:
  """A Llama of 2 GB in files of at most 500 MB, in bytes of a formula.

  Args:
    folder: New.
  """
  config = presets.get(
    'llama_350m', num_layers=37, max_positions=2048, mlp_dim=2816
  )
  rng = np.random.default_rng(0)
  noise = rng.normal(scale=0.02, size=1 << 20).astype(np.float32)

  def make(leaf: Any) -> np.ndarray:
    return np.resize(noise, leaf.shape)

  params = jax.tree.map(make, transformer.abstract_params(config))
  export.write(folder, config, params, max_shard_bytes=500_000_000)


def measure_memory(folder: pathlib.Path) -> dict[str, Any]:
  """What importing takes at most beyond the model; in a process of its own.

  Args:
    folder: With the checkpoint.
  """
  run = trained_run.find(f'hf:{folder}', name='from')
  jax.block_until_ready(jnp.zeros(8))
  before = _status_bytes('VmRSS')
  params = interchange.read_sharded(run, sharding.MeshConfig())
  jax.block_until_ready(params)
  # Not getrusage's, which counts what the process that started this one had.
  peak = _status_bytes('VmHWM')
  model = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  files = shards.files(checkpoint.open_checkpoint(folder).tensors)
  largest = max(path.stat().st_size for path in files)
  return {
    'checkpoint_bytes': sum(path.stat().st_size for path in files),
    'model_bytes': model,
    'largest_shard_bytes': largest,
    'extra_rss_bytes': peak - before - model,
    'extra_rss_over_largest_shard': (peak - before - model) / largest,
  }


def measure_export(folder: pathlib.Path) -> dict[str, Any]:
  """What exporting a run takes at most; in a process of its own.

  Args:
    folder: Of the run; files go into a folder beside it.
  """
  run = trained_run.find(folder, name='from')
  jax.block_until_ready(jnp.zeros(8))
  before = _status_bytes('VmRSS')
  out = folder.with_name('exported')
  interchange.export_run(run, out, max_shard_bytes=500_000_000)
  peak = _status_bytes('VmHWM')
  files = shards.files(checkpoint.open_checkpoint(out).tensors)
  largest = max(path.stat().st_size for path in files)
  shapes = jax.tree.leaves(transformer.abstract_params(run.model))
  return {
    'export_largest_parameter_bytes': max(4 * one.size for one in shapes),
    'export_rss_bytes': peak - before,
    'export_rss_over_largest_shard': (peak - before) / largest,
  }


def _status_bytes(name: str) -> int:
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith(f'{name}:'):
      return int(line.split()[1]) * 1024
  raise RuntimeError('This system does not say how much memory is in use.')


def _memory(folder: pathlib.Path) -> dict[str, Any]:
  command = [sys.executable, '-m', 'benchmarks.interchange']
  found: dict[str, Any] = {}
  for what in ('write', 'measure', 'import_run', 'measure_export'):
    done = subprocess.run(
      [*command, f'--{what}={folder}'],
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    if what.startswith('measure'):
      found |= json.loads(done.stdout.splitlines()[-1])
  return found


def _run_of(folder: pathlib.Path) -> pathlib.Path:
  return folder.with_name('run')


def _worst(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  every = list(results.values())
  answers = [one for one in every if 'num_prompts' in one]
  return {
    'max_abs_logit_diff': max(one['max_abs_logit_diff'] for one in every),
    'top1_agreement': min(one['top1_agreement'] for one in every),
    'roundtrip_bit_exact': all(
      one.get('roundtrip_bit_exact', True) for one in every
    ),
    'generation_identical': all(
      one['generation_identical_prompts'] == one['num_prompts']
      for one in answers
    ),
  }


def main() -> None:
  """Runs all of it, or one part in a process of its own."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--write', type=pathlib.Path)
  parser.add_argument('--measure', type=pathlib.Path)
  parser.add_argument('--import_run', type=pathlib.Path)
  parser.add_argument('--measure_export', type=pathlib.Path)
  arguments = parser.parse_args()
  if arguments.write:
    write_large(arguments.write)
    return
  if arguments.measure:
    print(json.dumps(measure_memory(arguments.measure)))
    return
  if folder := arguments.import_run:
    interchange.import_run(f'hf:{folder}', _run_of(folder))
    return
  if folder := arguments.measure_export:
    print(json.dumps(measure_export(_run_of(folder))))
    return
  results: dict[str, dict[str, Any]] = {}
  for kind, configs in (('small', _SMALL), ('real_width', _WIDE)):
    for family, config in configs.items():
      with tempfile.TemporaryDirectory() as folder:
        name = f'{family}_{kind}'
        results[name] = there_and_back(family, config, pathlib.Path(folder))
        print(name, results[name], file=sys.stderr, flush=True)
  with tempfile.TemporaryDirectory() as folder:
    results['gpt2_grown_to_medium'] = grow(pathlib.Path(folder))
  with tempfile.TemporaryDirectory() as folder:
    memory = _memory(pathlib.Path(folder) / 'large')
  peers = {
    name: importlib.import_module(name).__version__
    for name in ('torch', 'transformers', 'timm')
  }
  harness.record(
    'interchange',
    {**_worst(results), **memory, 'peers': peers, 'models': results},
  )


if __name__ == '__main__':
  main()
