"""All there is to a run of reinforcement learning with TLT."""

import dataclasses

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding
from efficient_llm.data.tasks import task as task_lib
from efficient_llm.speculative import drafter_program
from efficient_llm.tlt import rewards, rollout_config, spot_config
from efficient_llm.tlt import update as update_lib
from efficient_llm.training import loop as loop_lib
from efficient_llm.training import pretrain

# What JAX's coordinator takes is milliseconds in 32 bits.
_MAX_SECS = 2_000_000


@dataclasses.dataclass(frozen=True)
class TltConfig:
  """Settings of a run.

  Attributes:
    checkpoint: Folder of the pre-training run that is gone on from; None makes
      a model first, from worked examples of the task.
    first_drafter: Folder of a drafter's run for that checkpoint; None trains
      one first, where speculation needs one.
    task: The problems.
    supervised: The stage that makes the model; its data are the examples. With
      a start of its own, that run's model and tokenizer take the place of its
      own.
    num_examples: Worked examples of that stage.
    warmup: How the first drafter is trained, on the text of the model's run.
    max_prompt_tokens: Room for a prompt.
    eval_problems: Held-out problems of an evaluation, one answer to each.
    plain_every: In every how many steps the problems are answered by plain
      decoding as well, before or after in turn, to say what speculation saves.
      It costs that time and changes nothing else. 0 for never.
    seed: Of answers and of the drafter's data.
    process_timeout_secs: Where several processes run: how long the first to end
      its answers, or its rewards, waits for the last before the run ends.
  """

  checkpoint: str | None = None
  first_drafter: str | None = None
  task: task_lib.TaskConfig = task_lib.TaskConfig()
  supervised: pretrain.PretrainConfig = pretrain.PretrainConfig()
  num_examples: int = 20_000
  warmup: drafter_program.DrafterConfig = drafter_program.DrafterConfig()
  rollout: rollout_config.RolloutConfig = rollout_config.RolloutConfig()
  reward: rewards.RewardConfig = rewards.RewardConfig()
  update: update_lib.UpdateConfig = update_lib.UpdateConfig()
  drafter: spot_config.SpotConfig = spot_config.SpotConfig()
  loop: loop_lib.LoopConfig = loop_lib.LoopConfig(
    num_steps=50, log_every=1, eval_every=10
  )
  mesh: sharding.MeshConfig = sharding.MeshConfig()
  max_prompt_tokens: int = 32
  eval_problems: int = 64
  plain_every: int = 0
  seed: int = 0
  process_timeout_secs: float = 3600.0

  def validate(self) -> None:
    """Checks every part and the rules across them."""
    for field in dataclasses.fields(self):
      part = getattr(self, field.name)
      if hasattr(part, 'validate'):
        part.validate()
    for name in ('num_examples', 'max_prompt_tokens', 'eval_problems'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    # Refuses a warm-up that is longer, before any stage.
    optimizer_lib.make_schedule(
      self.update.optimizer,
      num_steps=self.loop.num_steps * self.update.num_updates,
      name='update.optimizer',
    )
    if self.plain_every < 0:
      raise ValueError(f'plain_every={self.plain_every} must be at least 0.')
    if self.rollout.max_rounds > 1 and not self.update.drop_uninformative:
      raise ValueError(
        f'rollout.max_rounds={self.rollout.max_rounds} looks for informative '
        'groups, so the others must be left out; set '
        'update.drop_uninformative=True.'
      )
    if self.plain_every and (
      self.rollout.speculation == 'off'
      or self.rollout.is_partial
      or self.rollout.max_rounds > 1
    ):
      raise ValueError(
        f'plain_every={self.plain_every} compares whole steps with '
        "speculation; set rollout.speculation to other than 'off', "
        'rollout.finish_share and rollout.max_rounds to 1, or plain_every to 0.'
      )
    timeout = self.process_timeout_secs
    if not 0 < timeout <= _MAX_SECS:
      raise ValueError(
        f'process_timeout_secs={timeout} must be above 0 and at most '
        f'{_MAX_SECS}; an hour is 3600.'
      )
    longest = self.max_prompt_tokens + self.rollout.sampling.max_new_tokens
    if self.update.sequence_length < longest:
      raise ValueError(
        f'update.sequence_length={self.update.sequence_length} must hold '
        f'max_prompt_tokens={self.max_prompt_tokens} and '
        'rollout.sampling.max_new_tokens='
        f'{self.rollout.sampling.max_new_tokens}; raise it to {longest}.'
      )

  @property
  def needs_model(self) -> bool:
    """Whether speculation needs a draft model."""
    return self.rollout.speculation in ('learned', 'union')
