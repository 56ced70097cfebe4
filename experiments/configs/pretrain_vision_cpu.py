"""A CaiT of 0.3 M parameters on scikit-learn's digits, in two minutes on a CPU.

Paper:    Touvron et al. 2021, CaiT, arXiv:2103.17239
Command:  ./run.sh pip install scikit-learn
          ./run.sh python -m experiments.pretrain --workdir=out/digits \
              --config=experiments/configs/pretrain_vision_cpu.py
          with …_cpu.py:deit for a DeiT; other images with
          --config.data.path=FOLDER (see data/image_files.py)
Hardware: two CPU cores
Time:     about a minute of training
Expected: validation loss 0.18 nats an image, 94.3 % of the classes right
"""

import dataclasses

from efficient_llm import optimizer
from efficient_llm.data import pipeline
from efficient_llm.models import presets
from efficient_llm.training import checkpoint, loop, pretrain


def get_config(name: str = 'cait') -> pretrain.PretrainConfig:
  """Ten classes of images of 8 x 8 pixels, of which a fifth is held out.

  Args:
    name: 'cait' or 'deit'.
  """
  model = presets.get('cait_digits')
  if name == 'deit':
    model = dataclasses.replace(
      model, class_layers=0, talking_heads=False, layer_scale=None
    )
  elif name != 'cait':
    raise ValueError(f'{name!r} must be cait or deit.')
  return pretrain.PretrainConfig(
    model=model,
    data=pipeline.DataConfig(
      path='digits',
      objective='classes',
      image_size=8,
      image_channels=1,
      image_shift=1,
      batch_size=32,
      validation_fraction=0.2,
    ),
    optimizer=optimizer.OptimizerConfig(
      learning_rate=4e-3, warmup_steps=50, weight_decay=0.05
    ),
    loop=loop.LoopConfig(
      num_steps=1500,
      eval_every=250,
      eval_batches=None,
      checkpoint=checkpoint.CheckpointConfig(every_steps=500),
    ),
  )
