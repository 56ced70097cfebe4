"""Two forms of the draft model, which differ in its norms.

'normed' norms the token's row, what the block's attention reads and what the
block gives. 'eagle' norms what its MLP reads and nothing else, and its block is
Llama's: the form of EAGLE's own drafters, which other engines load (`eagle`).
A drafter's parameters tell which form it has.

Source: Li et al. 2024, EAGLE, arXiv:2401.15077.
"""

import dataclasses
from typing import Any, Literal

from efficient_llm.models import modules
from efficient_llm.models.config import TransformerConfig
from efficient_llm.typing import Params

Form = Literal['normed', 'eagle']

# What a block of Llama has; biases and norms of heads it does without.
_OF_EAGLE = {
  'norm': 'rms',
  'norm_placement': 'pre',
  'positions': 'rotary',
  'activation': 'silu',
  'gated': True,
}


def of(params: Params) -> Form:
  """The form that a drafter's parameters are of."""
  return 'normed' if 'attention_norm' in params['block'] else 'eagle'


def check(config: TransformerConfig, form: Form) -> None:
  """Raises ValueError if a drafter of this form cannot draft for a target.

  Args:
    config: The target model.
    form: The form.
  """
  for name, wanted in _OF_EAGLE.items():
    value = getattr(config, name)
    if form == 'eagle' and value != wanted:
      raise ValueError(
        f"form='eagle' drafts for models with model.{name}={wanted!r}, and "
        f"this one has {value!r}; set form='normed'."
      )


def block(
  config: TransformerConfig, form: Form
) -> tuple[modules.Kind, TransformerConfig]:
  """The drafter's block, and the settings it is made with.

  Args:
    config: The target model.
    form: The form.
  """
  if form == 'normed':
    return 'block', config
  return 'bare_block', dataclasses.replace(
    config, bias=False, qkv_bias=False, qk_norm=False
  )


def bind(config: TransformerConfig, params: Params) -> Any:
  """The drafter's block with its parameters, ready to be called.

  Args:
    config: The target model.
    params: The drafter's.
  """
  return modules.bind(*block(config, of(params)), params['block'])


def part(tree: Any, like: Any) -> Any:
  """What nested dicts have of the keys of others.

  Args:
    tree: Has all of them.
    like: Nested dicts; what is none stands for a whole branch.
  """
  if not isinstance(like, dict):
    return tree
  return {name: part(tree[name], inner) for name, inner in like.items()}
