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
# # TLT: reinforcement learning with speculative rollouts
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/efficient_llm/efficient_llm/blob/main/experiments/colabs/tlt.ipynb)
#
# A tiny model learns from worked examples with careless slips in them, a
# drafter of one layer learns to guess it, and reinforcement learning goes on
# from there: answers are drafted, verified and rewarded. The same answers are
# then decoded with and without drafts.
#
# **What you should see:** every token the same with and without drafts, and
# fewer than 0.8 passes of the model a token. So small a model is not *faster*
# that way: its passes are too cheap to be spared. `docs/tlt.md` has what was
# measured.

# %%
import importlib.util

if importlib.util.find_spec('efficient_llm') is None:
  # %pip install -q git+https://github.com/efficient_llm/efficient_llm@v0.1.0
  print('Installed.')

# %%
import dataclasses
import json
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
from absl import flags

from efficient_llm import optimizer
from efficient_llm.data import config as data_config
from efficient_llm.data.tasks import task
from efficient_llm.models import presets, sampling
from efficient_llm.speculative import (
  drafter_loss,
  drafter_program,
  strategy_config,
)
from efficient_llm.tlt import (
  compare,
  rewards,
  rollout_config,
  spot_config,
  train,
  update,
)
from efficient_llm.tlt.config import TltConfig
from efficient_llm.training import checkpoint, loop, metrics, pretrain

# grain reads flags, which a notebook does not parse.
flags.FLAGS(['notebook'], known_only=True)

# %% [markdown]
# ## Dials
#
# `num_steps = 0` takes what suits the device.

# %%
num_steps = 0  # @param {type: "integer"}
group_size = 4  # @param {type: "integer"}
slip = 0.2  # @param {type: "number"}
draft = '3_1_4'  # @param ["1_1_2", "3_1_4", "7_1_8"]
temperature = 1.0  # @param {type: "number"}
seed = 0  # @param {type: "integer"}

# Steps of reinforcement learning, of the supervised stage and of the drafter;
# layers and width.
PRESETS = {
  'cpu': (6, 150, 60, 2, 64),
  'gpu': (40, 1000, 300, 8, 256),
  'tpu': (40, 1000, 300, 8, 256),
}
steps, supervised_steps, drafter_steps, num_layers, width = PRESETS[
  jax.default_backend()
]
steps = num_steps or steps
workdir = pathlib.Path(tempfile.mkdtemp())
print(jax.devices(), steps)

# %% [markdown]
# ## All stages in one configuration
#
# A problem is a number that wanders by given steps until it falls below ten;
# the answer writes every step out, so that its length cannot be read from the
# prompt.


# %%
def schedule(num_steps):
  return loop.LoopConfig(
    num_steps=num_steps,
    log_every=1,
    eval_every=None,
    eval_batches=4,
    tensorboard=False,
    checkpoint=checkpoint.CheckpointConfig(every_steps=num_steps),
  )


fast = optimizer.OptimizerConfig(learning_rate=4e-3, warmup_steps=10)
config = TltConfig(
  task=task.TaskConfig(name='trace', slip=slip, max_steps=3),
  supervised=pretrain.PretrainConfig(
    model=presets.get(
      'test', num_layers=num_layers, embed_dim=width, num_heads=4
    ),
    data=data_config.DataConfig(sequence_length=104, batch_size=16),
    optimizer=fast,
    loop=schedule(supervised_steps),
  ),
  num_examples=2000,
  warmup=drafter_program.DrafterConfig(
    optimizer=fast,
    loss=drafter_loss.DrafterLossConfig(num_passes=2),
    loop=schedule(drafter_steps),
  ),
  rollout=rollout_config.RolloutConfig(
    num_prompts=8,
    group_size=group_size,
    speculation='learned',
    # A table: the bandit would turn drafts off, which do not pay so small.
    strategy=strategy_config.StrategyConfig(
      name='fixed', arms=(draft,), thresholds=(1,)
    ),
    sampling=sampling.SamplingConfig(88, temperature=temperature),
  ),
  reward=rewards.RewardConfig(num_workers=1),
  update=update.UpdateConfig(
    sequence_length=104,
    rows_at_once=4,
    optimizer=optimizer.OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
  ),
  drafter=spot_config.SpotConfig(
    mode='separate',
    separate_steps=1,
    loss=drafter_loss.DrafterLossConfig(num_passes=2),
  ),
  loop=schedule(steps),
  max_prompt_tokens=16,
  eval_problems=16,
  seed=seed,
)
train.train(config, workdir=workdir)

# %% [markdown]
# ## Reward, and how many tokens a pass gives

# %%
records = metrics.read_metrics(workdir, kind='train')
_, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot([record['reward'] for record in records])
left.set(xlabel='step', ylabel='reward')
right.plot([record['acceptance_length'] for record in records])
right.set(xlabel='step', ylabel='tokens a pass of the model')
plt.show()

# %% [markdown]
# ## The same answers with and without drafts

# %%
compare.compare(
  dataclasses.replace(
    config,
    checkpoint=str(workdir / 'supervised'),
    first_drafter=str(workdir / 'first_drafter'),
  ),
  workdir=workdir,
  num_steps=1,
)
found = json.loads((workdir / 'ab' / 'result.json').read_bytes())

# %% [markdown]
# ## What you should see

# %%
same, tokens = found['share_of_same_tokens'], found['acceptance_length']
print(f'{same:.1%} of the tokens the same, {tokens:.2f} tokens a pass')
print(f'speculation is {found["speedup_rollout"]:.2f} times as fast here')
assert same > 0.95, f'Only {same:.1%} of the tokens are the same.'
assert tokens > 1.25, f'A pass gives only {tokens:.2f} tokens.'
