"""Reinforcement learning on written-out traces, on a laptop.

Paper:    Hu et al. 2025, Taming the Long Tail, arXiv:2511.16665
Command:  ./run.sh python -m experiments.tlt --cpu_workers=2
Hardware: two CPU cores, each a rollout worker
Time:     model 11 minutes, drafter 4, then 5 to 9 seconds a step
Expected: held-out reward 0.84 after 45 steps, from 0.30
"""

from efficient_llm import optimizer, sharding
from efficient_llm.data import config as data_config
from efficient_llm.data.tasks import task
from efficient_llm.models import config as model_config
from efficient_llm.models import sampling
from efficient_llm.speculative import (
  drafter_loss,
  drafter_program,
  strategy_config,
)
from efficient_llm.tlt import rollout_config, spot_config, update
from efficient_llm.tlt.config import TltConfig
from efficient_llm.training import checkpoint, loop, pretrain

# 26 steps of 26 words, prompt and end: the longest problem needs 692 tokens.
_LONGEST = 708
_MESH = sharding.MeshConfig(data=-1, fsdp=1)


def get_config() -> TltConfig:
  """A deep, narrow model of 2 M parameters; answers of 20 to 690 tokens.

  A draft costs a layer, so speculation pays by depth, as in large models.
  """
  return TltConfig(
    task=task.TaskConfig(name='trace', slip=0.2, max_steps=26),
    supervised=pretrain.PretrainConfig(
      model=model_config.TransformerConfig(
        num_layers=12,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=2,
        max_positions=768,
        scan_unroll=12,
      ),
      mesh=_MESH,
      data=data_config.DataConfig(
        sequence_length=720, batch_size=4, validation_fraction=0.02
      ),
      optimizer=optimizer.OptimizerConfig(
        learning_rate=2e-3, warmup_steps=50, schedule='wsd', decay_fraction=0.3
      ),
      loop=loop.LoopConfig(
        num_steps=650,
        eval_every=325,
        checkpoint=checkpoint.CheckpointConfig(every_steps=100),
      ),
    ),
    warmup=drafter_program.DrafterConfig(
      mesh=_MESH,
      batch_size=4,
      loss=drafter_loss.DrafterLossConfig(num_passes=2),
      optimizer=optimizer.OptimizerConfig(
        learning_rate=4e-3, warmup_steps=20, schedule='wsd', decay_fraction=0.3
      ),
      loop=loop.LoopConfig(
        num_steps=250,
        eval_every=100,
        checkpoint=checkpoint.CheckpointConfig(every_steps=100),
      ),
    ),
    rollout=rollout_config.RolloutConfig(
      num_prompts=8,
      group_size=8,
      max_live=4,
      # Copies beside it, or shorter chains, are slower here at any batch.
      speculation='learned',
      strategy=strategy_config.StrategyConfig(
        arms=('7_1_8',),
        thresholds=(1,),
        window=256,
        exploration=0.02,
      ),
      sampling=sampling.SamplingConfig(max_new_tokens=_LONGEST - 16),
    ),
    drafter=spot_config.SpotConfig(
      batch_size=2, loss=drafter_loss.DrafterLossConfig(num_passes=2)
    ),
    update=update.UpdateConfig(
      sequence_length=720,
      rows_at_once=2,
      optimizer=optimizer.OptimizerConfig(
        learning_rate=4e-4,
        warmup_steps=3,
        schedule='cosine',
        b2=0.95,
        weight_decay=0.0,
      ),
    ),
    loop=loop.LoopConfig(
      num_steps=45,
      log_every=1,
      eval_every=10,
      checkpoint=checkpoint.CheckpointConfig(every_steps=5),
    ),
    mesh=_MESH,
    max_prompt_tokens=16,
    eval_problems=128,
  )
