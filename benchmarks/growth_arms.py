"""Which models grow into which, by which methods, and how they are trained."""

import dataclasses
from typing import Any

from efficient_llm import optimizer as optimizer_lib
from efficient_llm.ligo.config import LearnConfig
from efficient_llm.models import presets
from efficient_llm.models.config import TransformerConfig

LARGE = presets.get('ladder_200k')


def _smaller(**changes: Any) -> TransformerConfig:
  changes.setdefault('scan_unroll', changes.get('num_layers', LARGE.num_layers))
  return dataclasses.replace(LARGE, **changes)


PAIRS: dict[str, TransformerConfig] = {
  'depth': _smaller(num_layers=2),
  'width': _smaller(embed_dim=32, num_heads=2),
  'both': _smaller(num_layers=2, embed_dim=32, num_heads=2),
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
  """

  method: str
  learn: LearnConfig = LearnConfig()
  moments: bool = False


_PAPER = _learn(1e-2, num_steps=100, tie='paper')
_CHEAP = _learn(1e-2, num_steps=20, batch_size=4)
_GENTLE = _learn(3e-3, num_steps=20, batch_size=4)
_LIGO = {
  'ligo_released': Arm('ligo_released', _PAPER),
  'ligo_released_cheap': Arm('ligo_released', _CHEAP),
}
ARMS: dict[str, dict[str, Arm]] = {
  'depth': {
    'stack': Arm('stack'),
    'interpolate': Arm('interpolate'),
    'identity': Arm('identity'),
    'stack_moments': Arm('stack', moments=True),
    'ligo': Arm('stack', _CHEAP),
    **_LIGO,
  },
  'width': {
    'stack': Arm('stack'),
    'net2net': Arm('net2net'),
    'aki': Arm('aki'),
    'clone': Arm('clone'),
    'noisy_clone': Arm('noisy_clone'),
    'noisy_clone_moments': Arm('noisy_clone', moments=True),
    'lemon': Arm('lemon'),
    'direct_copy': Arm('direct_copy'),
    'ligo': Arm('noisy_clone', _GENTLE),
    **_LIGO,
  },
  'both': {
    'stack': Arm('stack'),
    'net2net': Arm('net2net'),
    'noisy_clone': Arm('noisy_clone'),
    'staged': Arm('staged'),
    'lemon': Arm('lemon'),
    'direct_copy': Arm('direct_copy'),
    'ligo': Arm('noisy_clone', _GENTLE),
    **_LIGO,
  },
}
QUICK = {'depth': ('stack',), 'width': ('ligo',), 'both': ('noisy_clone',)}
RATE = 6e-3


def optimizer(rate: float = RATE, **more: Any) -> optimizer_lib.OptimizerConfig:
  """Of all runs: a constant rate after warm-up, unless more is said."""
  settings = {'schedule': 'constant', 'warmup_steps': 20} | more
  return optimizer_lib.OptimizerConfig(learning_rate=rate, **settings)
