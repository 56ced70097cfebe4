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
import numpy as np

from efficient_llm import typing

LAYER = '{layer}'

# How a tensor lies: 'as_is' inputs first, as our parameters (tables, Conv1D);
# 'transposed' outputs first (torch's Linear); 'patches' outputs first, then
# channel, row and column of a pixel (torch's Conv2d), which for us are one axis
# of rows, columns and channels.
Layout = Literal['as_is', 'transposed', 'patches']


@dataclasses.dataclass(frozen=True)
class Rule:
  """One parameter in the names of a family.

  Attributes:
    tensor: Name in the checkpoint, with {layer} for the number of the layer.
    leaf: Path of the parameter, such as 'layers/mlp/up/kernel'.
    layout: How the tensor lies.
    part: Which of how many equal parts of the outputs it is, where one tensor
      holds several parameters (GPT-2's c_attn).
    num_ones: Axes of length one that it begins with.
  """

  tensor: str
  leaf: str
  layout: Layout = 'as_is'
  part: tuple[int, int] = (0, 1)
  num_ones: int = 0


@dataclasses.dataclass(frozen=True)
class Placed:
  """A rule for one model.

  Attributes:
    rule: The rule.
    inputs: Sizes of the parameter's input axes; of 'patches' rows, columns and
      channels.
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
    """Of the tensor in the checkpoint: mostly a matrix or a vector."""
    ones = (1,) * self.rule.num_ones
    if self.rule.layout == 'patches':
      return ones + self.view
    columns = math.prod(self.outputs) * self.rule.part[1]
    if not self.inputs:
      return (*ones, columns)
    rows = math.prod(self.inputs)
    if self.rule.layout == 'transposed':
      return (*ones, columns, rows)
    return (*ones, rows, columns)

  @property
  def view(self) -> tuple[int, ...]:
    """The tensor's shape with all of its axes apart, in its own order."""
    outputs = self.outputs
    if self.rule.part[1] > 1:
      outputs = (self.rule.part[1], *outputs)
    if self.rule.layout == 'patches':
      return outputs + self.inputs[-1:] + self.inputs[:-1]
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
    Raises:
      ValueError: If pixels would be cut, which lie otherwise in the tensor.
    """
    num_inputs = len(self.inputs)
    if self.rule.layout == 'patches':
      pixels, *index = index
      if (pixels.start or 0, pixels.stop) not in (
        (0, None),
        (0, math.prod(self.inputs)),
      ):
        raise ValueError(
          f'{self.rule.leaf} must not be sharded by pixels; choose another '
          'mesh or rule.'
        )
      index = [slice(None)] * num_inputs + list(index)
    inputs = tuple(index[:num_inputs])
    outputs: tuple[slice | int, ...] = tuple(index[num_inputs:])
    if self.rule.part[1] > 1:
      outputs = (self.rule.part[0], *outputs)
    return inputs + outputs if self.rule.layout == 'as_is' else outputs + inputs

  def turn(self) -> tuple[int, ...]:
    """The order of axes that makes the cut a slice of the parameter."""
    num_inputs, num_outputs = len(self.inputs), len(self.outputs)
    inputs = list(range(num_outputs, num_outputs + num_inputs))
    if self.rule.layout == 'as_is':
      return tuple(range(num_inputs + num_outputs))
    if self.rule.layout == 'patches':
      inputs = inputs[1:] + inputs[:1]
    return (*inputs, *range(num_outputs))

  def as_stored(self, values: np.ndarray) -> np.ndarray:
    """A slice of the parameter, seen with its axes in the cut's order.

    Args:
      values: One layer's, contiguous, so that writing to the result writes
        there.
    """
    if self.rule.layout == 'patches':
      values = values.reshape(*self.inputs, *values.shape[1:])
    return values.transpose(np.argsort(self.turn()))


def place(
  rules: Sequence[Rule],
  axes: typing.PyTree,
  sizes: Mapping[str, int],
  *,
  pixels: tuple[int, ...] = (),
) -> dict[str, Placed]:
  """The rules that a model needs, by parameter.

  Args:
    rules: A family's table; what the model has no parameter for is left out.
    axes: The model's `logical_axes`.
    sizes: Length of every named axis.
    pixels: Rows, columns and channels of a patch, where there are patches.
  Raises:
    ValueError: If the table lacks one of the model's parameters.
  """
  named = flatten(axes)
  placed = {}
  for rule in rules:
    if rule.leaf not in named:
      continue
    leaf = named[rule.leaf]
    inputs = tuple(sizes[name] for name in leaf.inputs)
    placed[rule.leaf] = Placed(
      rule,
      pixels if rule.layout == 'patches' else inputs,
      tuple(sizes[name] for name in leaf.outputs),
      sizes[leaf.stack[0]] if leaf.stack else None,
    )
  if missing := sorted(set(named) - set(placed)):
    raise ValueError(
      f'The family must have a place for {missing[0]}; choose another family.'
    )
  return placed


def shapes(placed: Mapping[str, Placed]) -> dict[str, tuple[int, ...]]:
  """Shape of every tensor by name, parameter by parameter.

  Args:
    placed: From `place`.
  """
  return {name: one.shape for one in placed.values() for name in one.tensors()}


def makers(
  placed: Mapping[str, Placed],
) -> dict[str, list[tuple[str, int | None]]]:
  """The parameters, and the layer of them, that each tensor holds.

  Args:
    placed: From `place`.
  """
  found: dict[str, list[tuple[str, int | None]]] = {}
  for path, one in placed.items():
    for layer, name in enumerate(one.tensors()):
      found.setdefault(name, []).append(
        (path, None if one.num_layers is None else layer)
      )
  return found


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
