# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # LiGO: a large model that begins with a small one
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/efficient_llm/efficient_llm/blob/main/experiments/colabs/ligo.ipynb)
#
# A small model is trained; a model of twice its layers is grown out of it and
# trained on, and beside it one from nothing.
#
# **What you should see:** the grown model reaches the last loss of the one from
# nothing with at least 20 % fewer FLOPs.

# %%
import importlib.util

if importlib.util.find_spec('efficient_llm') is None:
  # %pip install -q git+https://github.com/efficient_llm/efficient_llm@v0.1.0
  print('Installed.')

# %%
import dataclasses
import json
import pathlib
import sysconfig
import tempfile

import jax
import matplotlib.pyplot as plt
from absl import flags

from efficient_llm import optimizer
from efficient_llm.data import pipeline
from efficient_llm.ligo import train
from efficient_llm.ligo.config import LigoConfig
from efficient_llm.models import presets
from efficient_llm.training import checkpoint, loop, metrics, pretrain

# grain reads flags, which a notebook does not parse.
flags.FLAGS(['notebook'], known_only=True)

# %% [markdown]
# ## Dials
#
# `num_steps = 0` takes what suits the device.

# %%
method = 'stack'  # @param ["stack", "interpolate", "identity", "append"]
num_steps = 0  # @param {type: "integer"}
learning_rate = 4e-3  # @param {type: "number"}
seed = 0  # @param {type: "integer"}

# Steps, rows of a batch, layers and width of the small model.
PRESETS = {
  'cpu': (200, 8, 2, 32),
  'gpu': (2000, 32, 4, 256),
  'tpu': (2000, 32, 4, 256),
}
steps, rows, num_layers, width = PRESETS[jax.default_backend()]
steps = num_steps or steps
workdir = pathlib.Path(tempfile.mkdtemp())
print(jax.devices(), steps)

# %% [markdown]
# ## The small model, and a large one from nothing

# %%
small = pretrain.PretrainConfig(
  model=presets.get(
    'test', num_layers=num_layers, embed_dim=width, num_heads=width // 16
  ),
  data=pipeline.DataConfig(
    path=f'{sysconfig.get_path("stdlib")}/[a-m]*.py',
    sequence_length=64,
    batch_size=rows,
    cache_dir=str(workdir / 'cache'),
  ),
  optimizer=optimizer.OptimizerConfig(
    learning_rate=learning_rate, schedule='constant', warmup_steps=10
  ),
  loop=loop.LoopConfig(
    num_steps=steps,
    eval_every=max(1, steps // 10),
    eval_batches=16,
    tensorboard=False,
    checkpoint=checkpoint.CheckpointConfig(every_steps=steps),
  ),
  seed=seed,
)
large = dataclasses.replace(
  small, model=dataclasses.replace(small.model, num_layers=2 * num_layers)
)
pretrain.train(small, workdir=workdir / 'small')
pretrain.train(large, workdir=workdir / 'scratch')

# %% [markdown]
# ## The same large model, grown

# %%
grown = LigoConfig(
  small=str(workdir / 'small'),
  scratch=str(workdir / 'scratch'),
  method=method,
  model=large.model,
  data=large.data,
  optimizer=large.optimizer,
  loop=large.loop,
  seed=seed,
)
train.train(grown, workdir=workdir / 'grown')
growth = json.loads((workdir / 'grown' / 'result.json').read_bytes())['growth']

# %%
for folder in ('small', 'scratch', 'grown'):
  evals = metrics.read_metrics(workdir / folder, kind='eval')
  config = small if folder == 'small' else large
  plt.plot(
    [
      record['step'] * config.tokens_per_step * config.flops_per_token
      for record in evals
    ],
    [record['loss'] for record in evals],
    label=folder,
  )
plt.axhline(growth['grown_loss'], linestyle=':', label='right after growth')
plt.xlabel("FLOPs of the model's own training")
plt.ylabel('loss, nats a byte')
plt.legend()
plt.show()

# %% [markdown]
# ## What you should see
#
# Warm: the small model is given. Cold: its training counts too.

# %%
warm, cold = growth['warm_flops_saving'], growth['cold_flops_saving']
print(f'fewer FLOPs: {warm:.0%} warm, {cold:.0%} cold')
assert warm > 0.2, f'Growth saved {warm:.0%} of the FLOPs, less than 20 %.'
