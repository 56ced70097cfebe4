"""The smallest model, batch and run that tests train with."""

import dataclasses
import functools
import pathlib
import random
from typing import Any

import jax
import numpy as np

from efficient_llm import optimizer as optimizer_lib
from efficient_llm.data import pipeline
from efficient_llm.models import sampling, transformer
from efficient_llm.training import checkpoint, loop, pretrain

MODEL = transformer.TransformerConfig(
  vocab_size=320, num_layers=1, embed_dim=16, num_heads=2, max_positions=64
)
SMALL_VOCAB = dataclasses.replace(MODEL, vocab_size=32)


def batch(
  *, batch_size: int = 8, num_tokens: int = 16, vocab_size: int = 32
) -> dict[str, np.ndarray]:
  """Random tokens, two documents a row, with uneven loss weights."""
  rng = np.random.default_rng(0)
  shape = (batch_size, num_tokens)
  half = num_tokens // 2
  return {
    'tokens': rng.integers(0, vocab_size, shape, np.int32),
    'targets': rng.integers(0, vocab_size, shape, np.int32),
    'segment_ids': np.broadcast_to(
      np.repeat(np.array([1, 2], np.int32), half), shape
    ).copy(),
    'positions': np.broadcast_to(
      np.tile(np.arange(half, dtype=np.int32), 2), shape
    ).copy(),
    'loss_weights': (rng.random(shape) < 0.7).astype(np.float32)
    * np.arange(1, batch_size + 1, dtype=np.float32)[:, None],
  }


def optimizer(
  model: transformer.TransformerConfig, **changes: Any
) -> optimizer_lib.Optimizer:
  """AdamW for ten steps, without warm-up."""
  config = optimizer_lib.OptimizerConfig(
    **{'schedule': 'constant', 'warmup_steps': 0, **changes}
  )
  return optimizer_lib.make_optimizer(
    config, transformer.logical_axes(model), num_steps=10
  )


@functools.cache
def params(model: transformer.TransformerConfig) -> dict[str, Any]:
  return jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0))


def write_text(folder: pathlib.Path, *, seed: int = 0) -> pathlib.Path:
  """Writes some documents of words from a small vocabulary."""
  rng = random.Random(seed)
  words = ['alpha', 'beta', 'gamma', 'delta', 'omega', 'zeta', 'eta', 'theta']
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'text.txt'
  path.write_text(
    '\n'.join(' '.join(rng.choices(words, k=12)) for _ in range(300)),
    encoding='utf-8',
  )
  return path


def config(
  text: pathlib.Path, *, cache_dir: pathlib.Path | None = None, **changes: Any
) -> pretrain.PretrainConfig:
  """Twelve steps, evaluated every six, saved every four.

  Args:
    text: What it is trained on.
    cache_dir: Where its tokens are kept.
    **changes: Fields of `loop.LoopConfig`.
  """
  every_steps = changes.pop('every_steps', 4)
  return pretrain.PretrainConfig(
    model=MODEL,
    data=pipeline.DataConfig(
      path=str(text),
      sequence_length=32,
      batch_size=8,
      cache_dir=None if cache_dir is None else str(cache_dir),
    ),
    optimizer=optimizer_lib.OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    loop=loop.LoopConfig(
      **{
        'num_steps': 12,
        'log_every': 3,
        'eval_every': 6,
        'eval_batches': 2,
        'tensorboard': False,
        'checkpoint': checkpoint.CheckpointConfig(
          every_steps=every_steps, max_to_keep=20
        ),
        **changes,
      }
    ),
    sampling=sampling.SamplingConfig(max_new_tokens=8),
  )
