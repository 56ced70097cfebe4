"""Name rules: which tensor of a checkpoint a parameter is, and how it lies.

A family is a table of them. Everything else follows from the named axes of the
parameter: its shape in the checkpoint, and which rows of the file a device's
slice of it needs.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax

from efficient_llm.models import transformer
from efficient_llm.models.config import TransformerConfig

LAYER = '{layer}'

# How a tensor lies: 'as_is' inputs first, as our parameters (tables, Conv1D);
# 'transposed' outputs first (torch's Linear).
Layout = Literal['as_is', 'transposed']


@dataclasses.dataclass(frozen=True)
class Rule:
  """One parameter in the names of a family.

  Attributes:
    tensor: Name in the checkpoint, with {layer} for the number of the layer.
    leaf: Path of the parameter, such as 'layers/mlp/up/kernel'.
    layout: How the tensor lies.
    part: Which of how many equal parts of the outputs it is, where one tensor
      holds several parameters (GPT-2's c_attn).
  """

  tensor: str
  leaf: str
  layout: Layout = 'as_is'
  part: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class Placed:
  """A rule for one model.

  Attributes:
    rule: The rule.
    inputs: Sizes of the parameter's input axes.
    outputs: Sizes of its output axes.
    num_layers: How many are stacked along the parameter's first axis; None for
      one outside the layers.
  """

  rule: Rule
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  num_layers: int | None

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the tensor in the checkpoint: a matrix, or a vector of outputs."""
    columns = math.prod(self.outputs) * self.rule.part[1]
    if not self.inputs:
      return (columns,)
    rows = math.prod(self.inputs)
    if self.rule.layout == 'transposed':
      return (columns, rows)
    return (rows, columns)

  @property
  def view(self) -> tuple[int, ...]:
    """The tensor's shape with all of its axes apart, in its own order."""
    outputs = self.outputs
    if self.rule.part[1] > 1:
      outputs = (self.rule.part[1], *outputs)
    if self.rule.layout == 'transposed':
      return outputs + self.inputs
    return self.inputs + outputs

  def tensors(self) -> Iterator[str]:
    """The tensors of this rule, layer by layer."""
    if self.num_layers is None:
      yield self.rule.tensor
      return
    for layer in range(self.num_layers):
      yield self.name(layer)

  def name(self, layer: int) -> str:
    """The tensor of a layer."""
    return self.rule.tensor.replace(LAYER, str(layer))

  def cut(self, index: Sequence[slice]) -> tuple[slice | int, ...]:
    """The part of `view` that is a slice of the parameter.

    Args:
      index: Of each input axis, then of each output axis.
    """
    inputs = tuple(index[: len(self.inputs)])
    outputs: tuple[slice | int, ...] = tuple(index[len(self.inputs) :])
    if self.rule.part[1] > 1:
      outputs = (self.rule.part[0], *outputs)
    if self.rule.layout == 'transposed':
      return outputs + inputs
    return inputs + outputs

  def turn(self) -> tuple[int, ...]:
    """The order of axes that makes the cut a slice of the parameter."""
    num_inputs, num_outputs = len(self.inputs), len(self.outputs)
    if self.rule.layout == 'transposed':
      return (
        *range(num_outputs, num_outputs + num_inputs),
        *range(num_outputs),
      )
    return tuple(range(num_inputs + num_outputs))


def place(
  rules: Sequence[Rule], config: TransformerConfig
) -> dict[str, Placed]:
  """The rules that a model needs, by parameter.

  Args:
    rules: A family's table; what the model has no parameter for is left out.
    config: The model.
  Raises:
    ValueError: If the table lacks one of the model's parameters.
  """
  axes = flatten(transformer.logical_axes(config))
  placed = {}
  for rule in rules:
    if rule.leaf not in axes:
      continue
    leaf = axes[rule.leaf]
    placed[rule.leaf] = Placed(
      rule,
      tuple(config.sizes[name] for name in leaf.inputs),
      tuple(config.sizes[name] for name in leaf.outputs),
      config.num_layers if leaf.stack else None,
    )
  if missing := sorted(set(axes) - set(placed)):
    raise ValueError(
      f'The family must have a place for {missing[0]}; choose another family.'
    )
  return placed


def shapes(placed: Mapping[str, Placed]) -> dict[str, tuple[int, ...]]:
  """Shape of every tensor by name, the layers in their order behind the rest.

  Args:
    placed: From `place`.
  """
  outside: dict[str, tuple[int, ...]] = {}
  layers: dict[int, dict[str, tuple[int, ...]]] = {}
  for one in placed.values():
    if one.num_layers is None:
      outside[one.rule.tensor] = one.shape
      continue
    for layer, name in enumerate(one.tensors()):
      layers.setdefault(layer, {})[name] = one.shape
  for layer in sorted(layers):
    outside |= layers[layer]
  return outside


def flatten(tree: Any) -> dict[str, Any]:
  """The leaves of nested dicts, by their keys joined with slashes."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dicts of leaves that `flatten` named."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree
