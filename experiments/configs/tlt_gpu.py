"""Reinforcement learning with answers of up to 8 k tokens, on one GPU.

Paper:    Hu et al. 2025, Taming the Long Tail, arXiv:2511.16665
Command:  ./run.sh python -m experiments.tlt --workdir=out/tlt_gpu \
              --config=experiments/configs/tlt_gpu.py
          with a model of your own: --checkpoint=DIR --task=gsm8k \
              --config.task.path=train.jsonl
Measure:  ./run.sh python -m benchmarks.tlt_end_to_end --cache_dir=out/tlt_gpu \
              --config=experiments/configs/tlt_gpu.py
Hardware: one H100 or H200 (80 GB)
Time:     not measured
Expected: not measured; only shapes were checked, without a GPU
"""

from efficient_llm import optimizer, sharding
from efficient_llm.data import config as data_config
from efficient_llm.data.tasks import task
from efficient_llm.models import presets, sampling
from efficient_llm.speculative import (
  drafter_loss,
  drafter_program,
  strategy_config,
)
from efficient_llm.tlt import rollout_config, spot_config, update
from efficient_llm.tlt.config import TltConfig
from efficient_llm.training import checkpoint, loop, pretrain

_LONGEST_PROMPT, _LONGEST_ANSWER = 512, 8192
_POSITIONS = _LONGEST_PROMPT + _LONGEST_ANSWER
_MESH = sharding.MeshConfig(data=-1, fsdp=1)


def get_config() -> TltConfig:
  """A model of 307 M parameters; eight answers to each of eight problems.

  A right trace has at most 2.6 k tokens: the room behind it is for answers that
  go astray, and for tasks of a --checkpoint.
  """
  return TltConfig(
    task=task.TaskConfig(name='trace', slip=0.2, max_steps=100),
    supervised=pretrain.PretrainConfig(
      # Two layers more than the preset, as the task has few words.
      model=presets.get(
        'llama_350m',
        num_layers=26,
        max_positions=_POSITIONS,
        tie_embeddings=True,
        dtype='bfloat16',
        remat='full',
      ),
      mesh=_MESH,
      data=data_config.DataConfig(
        sequence_length=4096, batch_size=16, validation_fraction=0.02
      ),
      optimizer=optimizer.OptimizerConfig(
        learning_rate=6e-4, warmup_steps=50, schedule='wsd', decay_fraction=0.3
      ),
      loop=loop.LoopConfig(
        num_steps=500,
        eval_every=250,
        checkpoint=checkpoint.CheckpointConfig(every_steps=100),
      ),
    ),
    num_examples=150_000,
    warmup=drafter_program.DrafterConfig(
      mesh=_MESH,
      loss=drafter_loss.DrafterLossConfig(num_passes=3),
      optimizer=optimizer.OptimizerConfig(
        learning_rate=5e-4, warmup_steps=30, schedule='wsd', decay_fraction=0.3
      ),
      loop=loop.LoopConfig(
        num_steps=300,
        eval_every=150,
        checkpoint=checkpoint.CheckpointConfig(every_steps=100),
      ),
    ),
    rollout=rollout_config.RolloutConfig(
      num_prompts=8,
      group_size=8,
      max_live=64,
      rounds_at_once=32,
      # The paper's: trees of 48, 32, 16 and 8 nodes from 1, 2, 5 and 21 live
      # answers on, none above 32.
      strategy=strategy_config.StrategyConfig(),
      sampling=sampling.SamplingConfig(
        max_new_tokens=_LONGEST_ANSWER, temperature=0.9
      ),
    ),
    # One GPU is one worker, which idles at no time.
    drafter=spot_config.SpotConfig(
      mode='separate',
      batch_size=2,
      separate_steps=16,
      loss=drafter_loss.DrafterLossConfig(num_passes=3),
      optimizer=optimizer.OptimizerConfig(
        learning_rate=1e-4, schedule='constant', warmup_steps=0
      ),
    ),
    update=update.UpdateConfig(
      sequence_length=_POSITIONS,
      rows_at_once=2,
      optimizer=optimizer.OptimizerConfig(
        learning_rate=2e-5, warmup_steps=0, weight_decay=0.0
      ),
    ),
    loop=loop.LoopConfig(
      num_steps=50,
      log_every=1,
      eval_every=10,
      checkpoint=checkpoint.CheckpointConfig(every_steps=5),
    ),
    mesh=_MESH,
    max_prompt_tokens=_LONGEST_PROMPT,
    eval_problems=128,
  )
