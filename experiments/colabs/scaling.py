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
# # Scaling laws: a loss known before it is paid for
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/efficient_llm/efficient_llm/blob/main/experiments/colabs/scaling.ipynb)
#
# A few small models are trained on text. From their curves the loss of a larger
# one is predicted, with an interval, before it is trained; then it is, and the
# two are compared.
#
# **What you should see:** the prediction within 10 % of what the target
# reaches.

# %%
import importlib.util

if importlib.util.find_spec('efficient_llm') is None:
  # %pip install -q git+https://github.com/efficient_llm/efficient_llm@v0.1.0
  print('Installed.')

# %%
import pathlib
import sysconfig
import tempfile

import jax
import matplotlib.pyplot as plt
from absl import flags

from efficient_llm import optimizer
from efficient_llm.data import pipeline
from efficient_llm.models import presets, transformer
from efficient_llm.scaling import job
from efficient_llm.scaling.config import ScalingConfig
from efficient_llm.training import checkpoint, loop, metrics, pretrain

# grain reads flags, which a notebook does not parse.
flags.FLAGS(['notebook'], known_only=True)

# %% [markdown]
# ## Dials
#
# `num_steps = 0` takes what suits the device.

# %%
num_models = 4  # @param {type: "integer"}
num_steps = 0  # @param {type: "integer"}
learning_rate = 4e-3  # @param {type: "number"}
seed = 0  # @param {type: "integer"}

# Steps, rows of a batch, width of the smallest model.
PRESETS = {'cpu': (150, 8, 16), 'gpu': (2000, 32, 64), 'tpu': (2000, 32, 64)}
steps, rows, width = PRESETS[jax.default_backend()]
steps = num_steps or steps
# Each is a half wider than the one before; the target twice the widest.
widths = [width * 3**i // 2**i // 8 * 8 for i in range(num_models)]
target_width = 2 * widths[-1]
workdir = pathlib.Path(tempfile.mkdtemp())
print(jax.devices(), widths, target_width)

# %% [markdown]
# ## The ladder
#
# All models read the same text (sources of Python's standard library) at a
# constant rate, so that every evaluation on the way is a row for the law.


# %%
def config_of(width):
  return pretrain.PretrainConfig(
    model=presets.get('test', embed_dim=width, num_heads=width // 8),
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
      eval_every=max(1, steps // 6),
      eval_batches=16,
      tensorboard=False,
      checkpoint=checkpoint.CheckpointConfig(every_steps=steps),
    ),
    seed=seed,
  )


for width in widths:
  pretrain.train(config_of(width), workdir=workdir / f'width_{width}')

# %% [markdown]
# ## The prediction, before the target is trained

# %%
target = config_of(target_width)
predicted = job.run(
  ScalingConfig(
    runs=str(workdir / 'width_*' / 'result.json'),
    target_params=transformer.num_params(target.model),
    target_tokens=steps * target.tokens_per_step,
    num_bootstraps=8,
  ),
  workdir=workdir / 'prediction',
)['predictions'][0]
print({name: predicted[name] for name in ('loss', 'low', 'high', 'warnings')})

# %% [markdown]
# ## The target

# %%
pretrain.train(target, workdir=workdir / 'target')

# %%
for folder in [*(f'width_{width}' for width in widths), 'target']:
  evals = metrics.read_metrics(workdir / folder, kind='eval')
  plt.plot(
    [record['step'] * target.tokens_per_step for record in evals],
    [record['loss'] for record in evals],
    label=folder,
  )
achieved = evals[-1]['loss']
plt.errorbar(
  steps * target.tokens_per_step,
  predicted['loss'],
  [
    [predicted['loss'] - predicted['low']],
    [predicted['high'] - predicted['loss']],
  ],
  fmt='o',
  label='predicted',
)
plt.xlabel('tokens')
plt.ylabel('loss, nats a byte')
plt.legend()
plt.show()

# %% [markdown]
# ## What you should see

# %%
error = abs(predicted['loss'] / achieved - 1)
print(f'predicted {predicted["loss"]:.3f}, achieved {achieved:.3f}')
assert error < 0.1, f'The prediction is off by {error:.1%}, more than 10 %.'
