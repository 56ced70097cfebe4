"""Pre-training of a named model, in the style of its paper.

Command:  ./run.sh python -m experiments.pretrain --workdir=out/gpt2 \
              --config=experiments/configs/pretrain.py:gpt2
Hardware: by preset: 'test' and 'ladder_*' on a CPU, the others on accelerators
Time:     by preset and loop.num_steps; `experiments.plan` estimates it
Expected: `--config=…:test` with 200 steps of 32 x 128 bytes ends below 2.9
          nats a byte; large presets were compiled, not trained, here
"""

from efficient_llm import optimizer
from efficient_llm.data import pipeline
from efficient_llm.models import presets
from efficient_llm.training import loop, pretrain


def get_config(preset: str = 'ladder_1m') -> pretrain.PretrainConfig:
  """A run of any preset; masked objective for bidirectional models of text.

  Models of images are for --config.data.path=FOLDER with as many classes as
  model.vocab_size.
  """
  model = presets.get(preset)
  data = pipeline.DataConfig(
    sequence_length=min(model.max_positions, 1024),
    batch_size=32,
    objective='causal' if model.causal else 'masked',
  )
  if model.reads_images:
    data = pipeline.DataConfig(
      path='digits',
      batch_size=32,
      objective='classes',
      image_size=model.image_size,
      image_channels=model.image_channels,
    )
  return pretrain.PretrainConfig(
    model=model,
    data=data,
    optimizer=optimizer.OptimizerConfig(learning_rate=6e-4, warmup_steps=200),
    loop=loop.LoopConfig(num_steps=10_000),
  )
