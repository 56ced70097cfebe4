"""The main job on a laptop: a byte-level model of 2.3 M parameters.

Command:  ./run.sh
          ./run.sh --quick, which is this file with :quick behind it
Hardware: two CPU cores
"""

from efficient_llm import optimizer, sharding
from efficient_llm.data import config as data_config
from efficient_llm.data.tasks import task
from efficient_llm.diloco import compression, outer
from efficient_llm.end_to_end.config import (
  EndToEndConfig,
  GrowthConfig,
  IslandsConfig,
  Rung,
)
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

_MESH = sharding.MeshConfig(data=-1, fsdp=1)
# The task in bytes: at most 59 to a step, 11 for the end, 21 for the prompt.
_BYTES_PER_STEP, _END, _PROMPT = 59, 17, 24


def get_config(size: str = 'full') -> EndToEndConfig:
  """Layers make the ladder: a draft costs one, so depth makes it cheap.

  Args:
    size: 'full', or 'quick' to see that everything works.
  """
  if size not in ('full', 'quick'):
    raise ValueError(f"{size!r} must be 'full' or 'quick'.")
  is_quick = size == 'quick'
  num_steps = 40 if is_quick else 300
  return EndToEndConfig(
    target=pretrain.PretrainConfig(
      model=_model(4 if is_quick else 12),
      mesh=_MESH,
      data=data_config.DataConfig(sequence_length=128, batch_size=16),
      optimizer=_muon(2e-3, warmup_steps=20 if not is_quick else 10),
      loop=_loop(num_steps, eval_every=num_steps // 10),
      sampling=sampling.SamplingConfig(
        max_new_tokens=160, temperature=0.7, top_p=0.95
      ),
      sample_prompts=('def main(', 'class ', 'import '),
    ),
    ladder=tuple(
      Rung(num_layers=n) for n in ((1, 2) if is_quick else (1, 2, 3, 6))
    ),
    growth=GrowthConfig(
      num_steps=20 if is_quick else 120,
      optimizer=_muon(2e-3, warmup_steps=10),
    ),
    islands=IslandsConfig(
      num_steps=20 if is_quick else 100,
      islands=4,
      sync_period=10 if is_quick else 20,
      optimizer=_muon(1e-3, warmup_steps=10),
      outer=outer.OuterConfig(learning_rate=0.7, momentum=0.5),
      compression=compression.CompressionConfig('int4'),
    ),
    reasoning=_reasoning(is_quick=is_quick),
  )


def _model(num_layers: int) -> model_config.TransformerConfig:
  return model_config.TransformerConfig(
    num_layers=num_layers,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=2,
    max_positions=768,
    scan_unroll=num_layers,
  )


def _reasoning(*, is_quick: bool) -> TltConfig:
  max_steps = 2 if is_quick else 6
  answer = _BYTES_PER_STEP * max_steps + _END
  longest = _PROMPT + answer
  return TltConfig(
    task=task.TaskConfig(name='trace', slip=0.3, max_steps=max_steps),
    supervised=pretrain.PretrainConfig(
      mesh=_MESH,
      data=data_config.DataConfig(
        sequence_length=longest, batch_size=10, validation_fraction=0.02
      ),
      optimizer=_muon(2e-3, warmup_steps=10),
      loop=_loop(20 if is_quick else 240, eval_every=100),
    ),
    num_examples=2000 if is_quick else 20_000,
    warmup=drafter_program.DrafterConfig(
      mesh=_MESH,
      batch_size=8,
      loss=drafter_loss.DrafterLossConfig(num_passes=2),
      optimizer=optimizer.OptimizerConfig(
        learning_rate=4e-3,
        warmup_steps=5,
        schedule='wsd',
        decay_fraction=0.3,
      ),
      loop=_loop(10 if is_quick else 100, eval_every=50),
    ),
    rollout=rollout_config.RolloutConfig(
      num_prompts=4 if is_quick else 16,
      group_size=4 if is_quick else 8,
      max_live=4,
      speculation='learned',
      strategy=strategy_config.StrategyConfig(
        arms=('7_1_8',), thresholds=(1,), window=256, exploration=0.02
      ),
      sampling=sampling.SamplingConfig(max_new_tokens=answer),
    ),
    drafter=spot_config.SpotConfig(
      batch_size=2, loss=drafter_loss.DrafterLossConfig(num_passes=2)
    ),
    update=update.UpdateConfig(
      sequence_length=longest,
      rows_at_once=4,
      optimizer=optimizer.OptimizerConfig(
        learning_rate=6e-5,
        warmup_steps=1 if is_quick else 3,
        schedule='cosine',
        b2=0.95,
        weight_decay=0.0,
      ),
    ),
    loop=_loop(2 if is_quick else 12, eval_every=4, log_every=1, save_every=5),
    mesh=_MESH,
    max_prompt_tokens=_PROMPT,
    eval_problems=32 if is_quick else 128,
    plain_every=1 if is_quick else 2,
  )


def _muon(rate: float, *, warmup_steps: int) -> optimizer.OptimizerConfig:
  # After 300 steps 1.68 nats a byte in 12 layers, where AdamW had 2.14.
  return optimizer.OptimizerConfig(
    name='muon',
    learning_rate=rate,
    warmup_steps=warmup_steps,
    schedule='wsd',
    decay_fraction=0.3,
  )


def _loop(
  num_steps: int, *, eval_every: int, log_every: int = 10, save_every: int = 100
) -> loop.LoopConfig:
  return loop.LoopConfig(
    num_steps=num_steps,
    log_every=log_every,
    eval_every=eval_every,
    eval_batches=32,
    checkpoint=checkpoint.CheckpointConfig(every_steps=save_every),
  )
