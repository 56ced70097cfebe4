"""The pairs of the LiGO paper at full size, learned as it says.

Paper:    Wang et al. 2023, LiGO, arXiv:2303.00980, section 4 and appendix
Command:  ./run.sh python -m experiments.pretrain --workdir=out/small \
              --config=experiments/configs/ligo_papers.py:bert_small
          ./run.sh python -m experiments.ligo --workdir=out/large \
              --config=experiments/configs/ligo_papers.py:bert_small_base \
              --config.small=out/small
          both with --config.data.path=TEXT --config.data.tokenizer=TOKENIZER;
          images with --config.data.path=FOLDER (see data/image_files.py);
          --config.method=auto for the method that suits
Hardware: accelerators; `experiments.plan` tells how many
Time:     not run
Expected: 44.7 % fewer FLOPs for BERT-Base, 45.2 % for Large, 47.2 % for
          RoBERTa-Base, 22.5 % for GPT-2 Medium, 52.6 % for CaiT-S24 and 55.4 %
          for DeiT-B, as published; by
          `benchmarks.ligo_memory`, learning BERT-Large's or GPT-2 Medium's
          operator takes less memory than training it
"""

import dataclasses
from typing import Any

from efficient_llm import optimizer
from efficient_llm.data import pipeline
from efficient_llm.ligo.config import LearnConfig, LigoConfig
from efficient_llm.models import presets
from efficient_llm.training import checkpoint, loop
from efficient_llm.training.config import PretrainConfig

# Large preset, tokens of a sequence, sequences of a batch, peak rate.
_PAIRS = {
  'bert_small_base': ('bert_base', 128, 256, 2e-4),
  'bert_base_large': ('bert_large', 128, 256, 2e-4),
  'roberta_small_base': ('roberta_base', 128, 1024, 8e-4),
  'gpt2_medium': ('gpt2_medium', 1024, 384, 2e-4),
}
# Large preset; 300 passes over ImageNet in batches of 1024, as DeiT and CaiT.
_IMAGE_PAIRS = {'cait_xs24_s24': 'cait_s24', 'deit_small_base': 'deit_base'}
# The models that these grow out of, with whose settings.
_SMALL = {
  'bert_small': 'bert_small_base',
  'bert_base': 'bert_base_large',
  'roberta_small': 'roberta_small_base',
  'gpt2': 'gpt2_medium',
  'cait_xs24': 'cait_xs24_s24',
  'deit_small': 'deit_small_base',
}


def get_config(name: str = 'bert_small_base') -> PretrainConfig:
  """A pair, or a small model of one.

  Args:
    name: A pair, for `experiments.ligo`; or a preset that one begins with, for
      `experiments.pretrain`.
  """
  if name in _SMALL:
    run = get_config(_SMALL[name])
    fields: dict[str, Any] = {
      field.name: getattr(run, field.name)
      for field in dataclasses.fields(PretrainConfig)
    }
    fields['model'] = _model(name)
    return PretrainConfig(**fields)
  if name in _IMAGE_PAIRS:
    return _of_images(_IMAGE_PAIRS[name])
  if name not in _PAIRS:
    names = ', '.join([*_PAIRS, *_IMAGE_PAIRS, *_SMALL])
    raise ValueError(f'{name!r} must be one of {names}.')
  preset, num_tokens, batch_size, rate = _PAIRS[name]
  model = _model(preset)
  return LigoConfig(
    small='out/small',
    method='ligo_released',
    learn=_learn(rate),
    model=model,
    data=pipeline.DataConfig(
      sequence_length=num_tokens,
      batch_size=batch_size,
      objective='causal' if model.causal else 'masked',
    ),
    optimizer=optimizer.OptimizerConfig(
      learning_rate=rate,
      warmup_steps=10_000,
      # A line down to 0 as soon as warm-up ends.
      schedule='wsd',
      decay_fraction=0.975,
      final_fraction=0.0,
    ),
    loop=loop.LoopConfig(
      num_steps=400_000,
      eval_every=5000,
      checkpoint=checkpoint.CheckpointConfig(every_steps=5000),
    ),
  )


def _of_images(preset: str) -> LigoConfig:
  model = _model(preset)
  # 5e-4 for every 512 images.
  rate = 1e-3
  return LigoConfig(
    small='out/small',
    method='ligo_released',
    learn=_learn(rate),
    model=model,
    data=pipeline.DataConfig(
      path='images',
      objective='classes',
      image_size=model.image_size,
      image_flip=True,
      batch_size=1024,
    ),
    optimizer=optimizer.OptimizerConfig(
      learning_rate=rate, warmup_steps=6250, weight_decay=0.05
    ),
    loop=loop.LoopConfig(
      num_steps=375_000,
      eval_every=5000,
      checkpoint=checkpoint.CheckpointConfig(every_steps=5000),
    ),
  )


def _learn(rate: float) -> LearnConfig:
  return LearnConfig(
    num_steps=100,
    tie='paper',
    # Warm-up would be as long as all of it.
    optimizer=optimizer.OptimizerConfig(
      learning_rate=rate, warmup_steps=0, weight_decay=0.0
    ),
  )


def _model(preset: str) -> presets.TransformerConfig:
  return presets.get(preset, dtype='bfloat16', remat='dots')
