"""All there is to a pre-training run, and the rules across its parts."""

import dataclasses

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding
from efficient_llm.data import pipeline
from efficient_llm.models import sampling as sampling_lib
from efficient_llm.models import transformer
from efficient_llm.training import loop as loop_lib


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """All there is to a pre-training run, on text or on images with classes.

  Attributes:
    sampling: How the samples at the end are drawn (causal models).
    sample_prompts: Their beginnings; empty for none.
    z_loss: Weight of the log-partition penalty.
    seed: Of the initial parameters; data.seed orders the data.
    start: Folder of a run of the same model (or hf:DIR), whose newest
      parameters are gone on from; moments and schedule start anew. Empty for
      new parameters.
    resting_layers: Layers that are not trained, and with them nothing outside
      the layers is; the lowest in a row cost no backward pass.
  """

  model: transformer.TransformerConfig = transformer.TransformerConfig()
  data: pipeline.DataConfig = pipeline.DataConfig()
  optimizer: optimizer_lib.OptimizerConfig = optimizer_lib.OptimizerConfig()
  loop: loop_lib.LoopConfig = loop_lib.LoopConfig()
  mesh: sharding.MeshConfig = sharding.MeshConfig()
  sampling: sampling_lib.SamplingConfig = sampling_lib.SamplingConfig()
  sample_prompts: tuple[str, ...] = ()
  z_loss: float = 0.0
  seed: int = 0
  start: str = ''
  resting_layers: tuple[int, ...] = ()

  @property
  def num_resting(self) -> int:
    """Layers in a row from the lowest on that rest."""
    count = 0
    while count in self.resting_layers:
      count += 1
    return count

  @property
  def unit(self) -> str:
    """What is counted and shown to people as a token."""
    return 'images' if self.model.reads_images else 'tokens'

  @property
  def tokens_per_step(self) -> int:
    """Tokens of a batch; an image has one target and counts as a token."""
    if self.model.reads_images:
      return self.data.batch_size
    return self.data.batch_size * self.data.sequence_length

  @property
  def flops_per_token(self) -> float:
    """Of training, of the large products; per image where those are read."""
    if self.model.reads_images:
      return transformer.flops_per_image(
        self.model, num_resting=self.num_resting
      )
    return transformer.flops_per_token(
      self.model,
      num_tokens=self.data.sequence_length,
      num_resting=self.num_resting,
    )

  def validate(self) -> None:
    """Checks every part and the rules across them, before any compilation."""
    for field in dataclasses.fields(self):
      part = getattr(self, field.name)
      if hasattr(part, 'validate'):
        part.validate()
    self._check_inputs()
    some = set(range(self.model.num_layers)) - set(self.resting_layers)
    if self.resting_layers and (
      len(some) + len(self.resting_layers) != self.model.num_layers or not some
    ):
      raise ValueError(
        f'resting_layers={self.resting_layers} must be some of the '
        f'{self.model.num_layers} layers, each once, and not all; change it.'
      )
    if self.data.batch_size % self.loop.num_microbatches:
      raise ValueError(
        f'data.batch_size={self.data.batch_size} must be divisible by '
        f'loop.num_microbatches={self.loop.num_microbatches}; change one of '
        'them.'
      )
    optimizer_lib.make_schedule(self.optimizer, num_steps=self.loop.num_steps)

  def _check_inputs(self) -> None:
    """Checks that the data are what the model takes."""
    is_images = self.data.objective == 'classes'
    if self.model.reads_images != is_images:
      raise ValueError(
        f'model.patch_size={self.model.patch_size} and data.objective='
        f"{self.data.objective!r} must both be of images ('classes') or both "
        'of text (no patch_size); change one of them.'
      )
    if not is_images:
      self._check_text()
      return
    for name in ('image_size', 'image_channels'):
      ours, theirs = getattr(self.data, name), getattr(self.model, name)
      if ours != theirs:
        raise ValueError(
          f'data.{name}={ours} must be model.{name}={theirs}; change one of '
          'them.'
        )
    if self.sample_prompts:
      raise ValueError(
        f'sample_prompts={self.sample_prompts} are for text; leave them out.'
      )

  def _check_text(self) -> None:
    """Checks that the text is what the model takes."""
    if self.data.sequence_length > self.model.max_positions:
      raise ValueError(
        f'data.sequence_length={self.data.sequence_length} must not exceed '
        f'model.max_positions={self.model.max_positions}; change one of them.'
      )
    if self.model.causal != (self.data.objective == 'causal'):
      raise ValueError(
        f'model.causal={self.model.causal} needs data.objective='
        f'{"causal" if self.model.causal else "masked"}, got '
        f'{self.data.objective!r}.'
      )
