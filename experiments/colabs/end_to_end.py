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
# # The main job: four savings in one line
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/efficient_llm/efficient_llm/blob/main/experiments/colabs/end_to_end.ipynb)
#
# A ladder of small models predicts the loss of a target, the best of them
# grows into it, four islands train it on with rare and small messages, and
# reinforcement learning with drafted answers ends it. Every saving stands
# beside a baseline that is trained in the same line. `./run.sh` is the same
# with a larger model and more steps.
#
# **What you should see:** nine stages, a prediction within a tenth of what the
# target reaches, at least thirty times fewer bytes than data-parallel training
# at nearly its loss, and every token the same with and without drafts. At this
# size reinforcement learning teaches nothing yet.

# %%
import importlib.util

if importlib.util.find_spec('efficient_llm') is None:
  # %pip install -q git+https://github.com/efficient_llm/efficient_llm@v0.1.0
  print('Installed.')

# %%
import json
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
from absl import flags
from IPython import display

from efficient_llm import optimizer
from efficient_llm.data import config as data_config
from efficient_llm.data.tasks import task
from efficient_llm.diloco import compression, outer
from efficient_llm.end_to_end import line
from efficient_llm.end_to_end.config import (
  EndToEndConfig,
  GrowthConfig,
  IslandsConfig,
  Rung,
)
from efficient_llm.models import presets, sampling
from efficient_llm.speculative import (
  drafter_loss,
  drafter_program,
  strategy_config,
)
from efficient_llm.tlt import rollout_config, spot_config, update
from efficient_llm.tlt.config import TltConfig
from efficient_llm.training import checkpoint, loop, metrics, pretrain

# grain reads flags, which a notebook does not parse.
flags.FLAGS(['notebook'], known_only=True)

# %% [markdown]
# ## Dials
#
# `num_steps = 0` takes what suits the device; `path` may be a folder of your
# own texts.

# %%
num_steps = 0  # @param {type: "integer"}
path = 'stdlib'  # @param {type: "string"}
islands = 4  # @param [2, 4, 8] {type: "raw"}
outer_bits = 'int4'  # @param ["float32", "int8", "int4"]
method = 'stack'  # @param ["stack", "identity", "auto"]
slip = 0.2  # @param {type: "number"}

# Steps of the target, layers, width, steps of reinforcement learning.
PRESETS = {
  'cpu': (120, 4, 64, 2),
  'gpu': (1000, 12, 512, 20),
  'tpu': (1000, 12, 512, 20),
}
steps, num_layers, width, rl_steps = PRESETS[jax.default_backend()]
steps = num_steps or steps
workdir = pathlib.Path(tempfile.mkdtemp())
print(jax.devices(), steps)

# %% [markdown]
# ## All stages in one configuration


# %%
def schedule(num_steps):
  return loop.LoopConfig(
    num_steps=num_steps,
    log_every=max(1, num_steps // 20),
    eval_every=max(1, num_steps // 6),
    eval_batches=8,
    tensorboard=False,
    checkpoint=checkpoint.CheckpointConfig(every_steps=num_steps),
  )


fast = optimizer.OptimizerConfig(
  name='muon',
  learning_rate=2e-3,
  warmup_steps=10,
  schedule='wsd',
  decay_fraction=0.3,
)
reasoning = TltConfig(
  task=task.TaskConfig(name='trace', slip=slip, max_steps=1),
  supervised=pretrain.PretrainConfig(
    data=data_config.DataConfig(sequence_length=104, batch_size=16),
    optimizer=fast,
    loop=schedule(steps),
  ),
  num_examples=2000,
  warmup=drafter_program.DrafterConfig(
    optimizer=optimizer.OptimizerConfig(learning_rate=4e-3, warmup_steps=5),
    loss=drafter_loss.DrafterLossConfig(num_passes=2),
    loop=schedule(steps // 3),
  ),
  rollout=rollout_config.RolloutConfig(
    num_prompts=4,
    group_size=4,
    max_live=4,
    speculation='learned',
    strategy=strategy_config.StrategyConfig(
      name='fixed', arms=('3_1_4',), thresholds=(1,)
    ),
    sampling=sampling.SamplingConfig(max_new_tokens=80),
  ),
  drafter=spot_config.SpotConfig(
    loss=drafter_loss.DrafterLossConfig(num_passes=2)
  ),
  update=update.UpdateConfig(
    sequence_length=104,
    rows_at_once=4,
    optimizer=optimizer.OptimizerConfig(learning_rate=6e-5, warmup_steps=1),
  ),
  loop=schedule(rl_steps),
  max_prompt_tokens=24,
  eval_problems=32,
)
config = EndToEndConfig(
  target=pretrain.PretrainConfig(
    model=presets.get(
      'test',
      num_layers=num_layers,
      embed_dim=width,
      num_heads=4,
      max_positions=128,
    ),
    data=data_config.DataConfig(path=path, sequence_length=128, batch_size=16),
    optimizer=fast,
    loop=schedule(steps),
  ),
  ladder=(Rung(num_layers=1), Rung(num_layers=2)),
  growth=GrowthConfig(num_steps=steps // 2, method=method),
  islands=IslandsConfig(
    num_steps=steps // 2,
    islands=islands,
    sync_period=10,
    outer=outer.OuterConfig(learning_rate=0.7, momentum=0.5),
    compression=compression.CompressionConfig(outer_bits),
  ),
  reasoning=reasoning,
)
line.run(config, workdir=workdir)
result = json.loads((workdir / 'result.json').read_bytes())

# %% [markdown]
# ## What each technique brought

# %%
for name, sentence in result['verdicts'].items():
  print(f'{name}: {sentence}')

_, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for name in ('scratch', 'growth'):
  records = metrics.read_metrics(workdir / name, kind='eval')
  left.plot(
    [x['step'] for x in records], [x['loss'] for x in records], label=name
  )
left.set(xlabel='step', ylabel='validation loss, nats a byte')
for name in ('islands', 'control'):
  records = metrics.read_metrics(workdir / name, kind='eval')
  right.plot(
    [x['step'] for x in records], [x['loss'] for x in records], label=name
  )
right.set(xlabel='step')
for one in (left, right):
  one.legend()
plt.show()

# %% [markdown]
# ## The page to show to others

# %%
display.HTML((workdir / 'report.html').read_text())

# %% [markdown]
# ## What you should see

# %%
off = result['achieved_loss'] / result['predicted_loss'] - 1
fewer, same = result['diloco_byte_reduction'], result['rl_same_tokens']
print(f'{off:+.1%} from the prediction, {fewer:.0f} times fewer bytes')
print(f'{same:.1%} of the tokens the same with and without drafts')
assert abs(off) < 0.1, f'The prediction is off by {off:.1%}.'
assert fewer > 30, f'Only {fewer:.0f} times fewer bytes.'
assert same > 0.95, f'Only {same:.1%} of the tokens are the same.'
