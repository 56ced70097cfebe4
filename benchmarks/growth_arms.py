"""Which models grow into which, by which methods, and how they are trained."""

import dataclasses
from typing import Any

from efficient_llm import optimizer as optimizer_lib
from efficient_llm.ligo.config import (
  InheritConfig,
  LearnConfig,
  StageConfig,
)
from efficient_llm.models import presets
from efficient_llm.models.config import TransformerConfig

LARGE = presets.get('ladder_200k')
_WARMUP_STEPS = 20


def _smaller(**changes: Any) -> TransformerConfig:
  changes.setdefault('scan_unroll', changes.get('num_layers', LARGE.num_layers))
  return dataclasses.replace(LARGE, **changes)


PAIRS: dict[str, TransformerConfig] = {
  'depth': _smaller(num_layers=2),
  'width': _smaller(embed_dim=32, num_heads=2),
  'both': _smaller(num_layers=2, embed_dim=32, num_heads=2),
  'one_layer': _smaller(num_layers=1),
}


def _learn(rate: float, **settings: Any) -> LearnConfig:
  optimizer = dataclasses.replace(LearnConfig().optimizer, learning_rate=rate)
  return LearnConfig(optimizer=optimizer, **settings)


@dataclasses.dataclass(frozen=True)
class Arm:
  """A method as it is run.

  Attributes:
    method: Name of `methods.METHODS`.
    learn: Of its operator.
    moments: Whether Adam's moments grow too.
    stage: The same model, trained in another way first.
    inherit: How the small model teaches.
    beside: Whether the large model is trained while the operator is learned.
    warmup_steps: Of the large model; 0 goes on at the small one's rate.
  """

  method: str
  learn: LearnConfig = LearnConfig()
  moments: bool = False
  stage: StageConfig | None = None
  inherit: InheritConfig = InheritConfig()
  beside: bool = False
  warmup_steps: int = _WARMUP_STEPS


_PAPER = _learn(1e-2, num_steps=100, tie='paper')
_CHEAP = _learn(1e-2, num_steps=20, batch_size=4)
_GENTLE = _learn(3e-3, num_steps=20, batch_size=4)
_RELEASED = Arm('ligo_released', _PAPER)
# A tenth to an eighth of a run, as bert2BERT's 5 epochs of 40.
_TOP = StageConfig(60, rest_old=True)
_SUB_MODELS = StageConfig(80, sub_model_layers=1)
_INHERIT = Arm('random', inherit=InheritConfig(weight=1.0))
ARMS: dict[str, dict[str, Arm]] = {
  'depth': {
    'stack': Arm('stack'),
    'interpolate': Arm('interpolate'),
    'identity': Arm('identity'),
    'append': Arm('append'),
    'mslt': Arm('top', stage=_TOP),
    'bert2bert': Arm('stack', stage=_SUB_MODELS),
    'inherit': _INHERIT,
    'ligo': Arm('stack', _CHEAP),
    'ligo_released': _RELEASED,
  },
  'width': {
    'stack': Arm('stack'),
    'net2net': Arm('net2net'),
    'aki': Arm('aki'),
    'clone': Arm('clone'),
    'noisy_clone': Arm('noisy_clone'),
    'lemon': Arm('lemon'),
    'direct_copy': Arm('direct_copy'),
    'bert2bert': Arm('aki', stage=_SUB_MODELS),
    'inherit': _INHERIT,
    'ligo': Arm('noisy_clone', _GENTLE),
    'ligo_released': _RELEASED,
  },
  'both': {
    'stack': Arm('stack'),
    'net2net': Arm('net2net'),
    'noisy_clone': Arm('noisy_clone'),
    'staged': Arm('staged'),
    'lemon': Arm('lemon'),
    'direct_copy': Arm('direct_copy'),
    'bert2bert': Arm('aki', stage=_SUB_MODELS),
    'inherit': _INHERIT,
    'ligo': Arm('noisy_clone', _GENTLE),
    'ligo_released': _RELEASED,
  },
  'one_layer': {
    'stack': Arm('stack'),
    'identity': Arm('identity'),
    'append': Arm('append'),
    'inherit': _INHERIT,
    'ligo': Arm('stack', _CHEAP),
  },
}
# What of learning an operator helps: each differs from `learned` in one thing.
ABLATIONS: dict[str, dict[str, Arm]] = {
  'depth': {
    'not_learned': Arm('stack'),
    'learned': Arm('stack', _CHEAP),
    'five_steps': Arm('stack', dataclasses.replace(_CHEAP, num_steps=5)),
    'hundred_steps': Arm('stack', dataclasses.replace(_CHEAP, num_steps=100)),
    'whole_batches': Arm('stack', dataclasses.replace(_CHEAP, batch_size=None)),
    'tied_as_in_the_paper': Arm(
      'stack', dataclasses.replace(_CHEAP, tie='paper')
    ),
    'own_for_every_layer': Arm(
      'stack', dataclasses.replace(_CHEAP, tie='layer')
    ),
    'gentle': Arm('stack', _GENTLE),
    'beside_training': Arm(
      'stack', dataclasses.replace(_CHEAP, batch_size=None), beside=True
    ),
    'from_released_start': Arm('ligo_released', _CHEAP),
    'from_identity': Arm('identity', _CHEAP),
    'from_identity_not_learned': Arm('identity'),
    'with_moments': Arm('stack', _CHEAP, moments=True),
    'not_learned_with_moments': Arm('stack', moments=True),
    'without_warm_up': Arm('stack', _CHEAP, warmup_steps=0),
    'with_moments_without_warm_up': Arm(
      'stack', _CHEAP, moments=True, warmup_steps=0
    ),
  },
  'width': {
    'not_learned': Arm('noisy_clone'),
    'learned': Arm('noisy_clone', _GENTLE),
    'five_steps': Arm('noisy_clone', dataclasses.replace(_GENTLE, num_steps=5)),
    'hundred_steps': Arm(
      'noisy_clone', dataclasses.replace(_GENTLE, num_steps=100)
    ),
    'whole_batches': Arm(
      'noisy_clone', dataclasses.replace(_GENTLE, batch_size=None)
    ),
    'tied_as_in_the_paper': Arm(
      'noisy_clone', dataclasses.replace(_GENTLE, tie='paper')
    ),
    'own_for_every_layer': Arm(
      'noisy_clone', dataclasses.replace(_GENTLE, tie='layer')
    ),
    'beside_training': Arm(
      'noisy_clone', dataclasses.replace(_GENTLE, batch_size=None), beside=True
    ),
    'from_released_start': Arm('ligo_released', _GENTLE),
    'from_rest': Arm('stack', _GENTLE),
    'from_rest_not_learned': Arm('stack'),
    'with_moments': Arm('noisy_clone', _GENTLE, moments=True),
    'not_learned_with_moments': Arm('noisy_clone', moments=True),
    'without_warm_up': Arm('noisy_clone', _GENTLE, warmup_steps=0),
    'with_moments_without_warm_up': Arm(
      'noisy_clone', _GENTLE, moments=True, warmup_steps=0
    ),
  },
}
QUICK = {'depth': ('mslt',), 'both': ('ligo', 'bert2bert')}
RATE = 6e-3


def optimizer(rate: float = RATE, **more: Any) -> optimizer_lib.OptimizerConfig:
  """Of all runs: a constant rate after warm-up, unless more is said."""
  settings = {'schedule': 'constant', 'warmup_steps': _WARMUP_STEPS} | more
  return optimizer_lib.OptimizerConfig(learning_rate=rate, **settings)
