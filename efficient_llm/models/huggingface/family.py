"""What a family of models is: its names, and its settings in config.json."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from efficient_llm.models.config import TransformerConfig
from efficient_llm.models.huggingface import rules

ACTIVATIONS = {
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'relu': 'relu',
  'silu': 'silu',
  'swish': 'silu',
}
# What transformers calls our activations.
NAMES = {
  'gelu': 'gelu',
  'gelu_tanh': 'gelu_new',
  'relu': 'relu',
  'silu': 'silu',
}


@dataclasses.dataclass(frozen=True)
class Family:
  """One family.

  Attributes:
    model_type: As config.json spells it; of timm's how its architectures begin.
    table: Name rules, as a whole model with its head is named.
    prefix: Of all names but the head's; files of the bare model lack it.
    architectures: Classes of transformers that hold such a model, with a head
      and without.
    ignored: Names of tensors that hold no weight of ours: buffers, poolers.
    renamed: Old endings and what they are now.
    copies: Tensors that repeat another one: name -> the one they repeat.
    tied: Name -> the table it repeats where the head is tied.
    refused: Keys of config.json with the values that are understood; other
      values change what the model computes.
    read: config.json -> settings of the stack.
    write: Settings -> what config.json says of them.
    library: Which one has such models.
  """

  model_type: str
  table: tuple[rules.Rule, ...]
  prefix: str
  architectures: tuple[str, ...]
  read: Callable[['Settings'], TransformerConfig]
  write: Callable[[TransformerConfig], dict[str, Any]]
  ignored: tuple[re.Pattern[str], ...] = ()
  renamed: tuple[tuple[str, str], ...] = ()
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
  refused: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
  library: Literal['transformers', 'timm'] = 'transformers'

  def current_name(self, name: str) -> str | None:
    """What the table calls a tensor of a file; None where it is ignored."""
    for old, new in self.renamed:
      if name.endswith(old):
        name = name.removesuffix(old) + new
    if any(pattern.fullmatch(name) for pattern in self.ignored):
      return None
    if name.startswith(self.prefix) or name in self._outside:
      return name
    return self.prefix + name

  @property
  def _outside(self) -> set[str]:
    """Names of the head."""
    names = {rule.tensor for rule in self.table}
    names |= set(self.copies) | set(self.tied)
    return {name for name in names if not name.startswith(self.prefix)}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a config.json says, taken with checks.

  Attributes:
    values: The document.
    path: Of the file, for messages.
  """

  values: Mapping[str, Any]
  path: str

  def count(self, key: str, *, default: int | None = None) -> int:
    """A whole number of at least one."""
    value = self._get(key, default)
    if type(value) is not int or not 1 <= value < 1 << 31:
      raise self.refusal(key, 'a whole number of at least 1')
    return value

  def number(self, key: str, *, default: float | None = None) -> float:
    """A positive number."""
    value = self._get(key, default)
    if type(value) not in (int, float) or not 0 < value < float('inf'):
      raise self.refusal(key, 'a positive number')
    return float(value)

  def flag(self, key: str, *, default: bool) -> bool:
    """True or false."""
    value = self._get(key, default)
    if not isinstance(value, bool):
      raise self.refusal(key, 'true or false')
    return value

  def activation(self, key: str) -> Any:
    """An activation, as the stack calls it."""
    value = self._get(key, None)
    if not isinstance(value, str) or value not in ACTIVATIONS:
      raise self.refusal(key, f'one of {", ".join(ACTIVATIONS)}')
    return ACTIVATIONS[value]

  @property
  def architecture(self) -> str | None:
    """The class that saved the model."""
    value = self.values.get('architectures')
    if isinstance(value, list) and value and isinstance(value[0], str):
      return value[0]
    return None

  def refusal(self, key: str, rule: str) -> ValueError:
    """What to raise for a value that is not understood."""
    value = ascii(self.values.get(key))[:100]
    return ValueError(
      f'{self.path}: {key}={value} must be {rule}; this model cannot be taken '
      'over as it is.'
    )

  def _get(self, key: str, default: Any) -> Any:
    value = self.values.get(key)
    if value is not None:
      return value
    if default is None:
      raise ValueError(f'{self.path} must say {key}; add it.')
    return default
