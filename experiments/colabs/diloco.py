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
# # DiLoCo: islands that hardly talk
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/efficient_llm/efficient_llm/blob/main/experiments/colabs/diloco.ipynb)
#
# A model is trained for a while in the usual way. From there four islands go on
# by themselves and exchange what changed only now and then; beside them one run
# goes on that exchanges a gradient at every step. Islands that
# share a device send nothing: their bytes are counted.
#
# **What you should see:** at equal tokens a loss at most 10 % above that of
# data-parallel training, for at least eight times fewer bytes.

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
from efficient_llm.diloco import train, variants
from efficient_llm.diloco.compression import CompressionConfig
from efficient_llm.diloco.config import DilocoConfig
from efficient_llm.diloco.outer import OuterConfig
from efficient_llm.models import presets
from efficient_llm.training import checkpoint, loop, metrics, pretrain

# grain reads flags, which a notebook does not parse.
flags.FLAGS(['notebook'], known_only=True)

# %% [markdown]
# ## Dials
#
# `num_steps = 0` takes what suits the device.

# %%
islands = 4  # @param {type: "integer"}
sync_period = 10  # @param {type: "integer"}
bits = 'int8'  # @param ["float32", "float16", "int8", "int4", "e3m0"]
num_steps = 0  # @param {type: "integer"}
outer_rate = 0.7  # @param {type: "number"}
seed = 0  # @param {type: "integer"}

# Steps, rows of an island's batch, width of the model.
PRESETS = {'cpu': (150, 4, 32), 'gpu': (1500, 16, 256), 'tpu': (1500, 16, 256)}
steps, rows, width = PRESETS[jax.default_backend()]
steps = num_steps or steps
workdir = pathlib.Path(tempfile.mkdtemp())
print(jax.devices(), steps)

# %% [markdown]
# ## A shared beginning

# %%
first = pretrain.PretrainConfig(
  model=presets.get('test', embed_dim=width, num_heads=width // 16),
  data=pipeline.DataConfig(
    path=f'{sysconfig.get_path("stdlib")}/[a-m]*.py',
    sequence_length=64,
    batch_size=rows * islands,
    cache_dir=str(workdir / 'cache'),
  ),
  optimizer=optimizer.OptimizerConfig(
    learning_rate=4e-3, schedule='wsd', warmup_steps=10
  ),
  loop=loop.LoopConfig(
    num_steps=steps,
    eval_every=max(1, steps // 5),
    eval_batches=16,
    tensorboard=False,
    checkpoint=checkpoint.CheckpointConfig(every_steps=steps),
  ),
  seed=seed,
)
pretrain.train(first, workdir=workdir / 'first')

# %% [markdown]
# ## Islands, and data-parallel training at equal tokens

# %%
config = DilocoConfig(
  start=str(workdir / 'first'),
  islands=islands,
  sync_period=sync_period,
  model=first.model,
  data=dataclasses.replace(first.data, batch_size=rows, seed=1),
  optimizer=first.optimizer,
  loop=first.loop,
  outer=OuterConfig(learning_rate=outer_rate, momentum=0.5),
  compression=CompressionConfig(bits),
  seed=seed,
)
arms = {
  'islands': config,
  'data_parallel': variants.apply(
    'data_parallel',
    dataclasses.replace(config, compression=CompressionConfig()),
  ),
}
results = {}
for name, arm in arms.items():
  train.train(arm, workdir=workdir / name)
  results[name] = json.loads((workdir / name / 'result.json').read_bytes())

# %%
for name in arms:
  evals = metrics.read_metrics(workdir / name, kind='eval')
  plt.plot(
    [record['step'] for record in evals],
    [record['loss'] for record in evals],
    label=name,
  )
plt.xlabel('steps after the shared beginning')
plt.ylabel('loss, nats a byte')
plt.legend()
plt.show()

# %% [markdown]
# ## What you should see
#
# Data-parallel training sends a gradient of 4 bytes a parameter at every step.

# %%
ratio = results['islands']['eval_loss'] / results['data_parallel']['eval_loss']
sent = results['islands']['sent_bytes_per_island']
fewer = 4 * results['islands']['num_params'] * steps / sent
print(f'loss {ratio - 1:+.1%}, {fewer:.0f} times fewer bytes')
assert ratio < 1.1, f'The loss of the islands is {ratio - 1:.1%} higher.'
assert fewer > 0.8 * sync_period, f'Only {fewer:.1f} times fewer bytes.'
