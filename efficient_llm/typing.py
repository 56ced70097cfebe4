"""Dimension key, array aliases and the named axes of a parameter.

Dimension key, used in shapes ('B T D') and as suffixes of locals (x_BTD):

  B batch            T query positions   S key positions     D embed
  F mlp              N query heads       K key/value heads   H head dim
  V vocab            L layers            M islands           G group
  W draft width      P prompt positions  E new tokens        U ancestor words
  R rows             C candidates, image channels
  Y image rows       X image columns
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import beartype
import jaxtyping
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

__all__ = [
  'Array',
  'Batch',
  'Bool',
  'Float',
  'Int',
  'KeyData',
  'LogicalAxes',
  'Metrics',
  'Params',
  'PyTree',
  'Scalar',
  'UInt8',
  'UInt32',
  'check_choices',
  'typed',
]

PyTree = Any
# A nested dict whose leaves are arrays.
Params = Mapping[str, Any]
Batch = Mapping[str, Any]
Scalar = Float[Array, '']
Metrics = dict[str, Any]
# What jax.random.key_data returns: a plain array can be stored and vmapped.
KeyData = UInt32[Array, '...']

_Function = TypeVar('_Function', bound=Callable[..., Any])


def typed(function: _Function) -> _Function:
  """Checks the annotated shapes and dtypes at every call.

  Inside a jitted function the check runs once, while tracing.

  Args:
    function: Annotated with the aliases of this module.
  Returns:
    The function, which now refuses arrays of another shape or dtype.
  """
  return jaxtyping.jaxtyped(typechecker=beartype.beartype)(function)


def check_choices(config: Any, *, name: str) -> None:
  """Refuses a value that the `Literal` type of its field does not list.

  Args:
    config: A dataclass.
    name: What it is called in the whole configuration.
  Raises:
    ValueError: Lists the choices.
  """
  for field, hint in get_type_hints(type(config)).items():
    value, choices = getattr(config, field), get_args(hint)
    if get_origin(hint) is Literal and value not in choices:
      raise ValueError(
        f'{name}.{field}={value!r} must be one of {", ".join(choices)}.'
      )


@dataclasses.dataclass(frozen=True)
class LogicalAxes:
  """The names of one parameter's axes: stacked axes, then inputs, then outputs.

  A weight maps its inputs to its outputs, so sharding, growth operators,
  parameter counts and matrix optimisers all read this one record. It is a leaf
  of the tree that `transformer.logical_axes` returns.

  Attributes:
    inputs: Axes that are summed over when the parameter is applied.
    outputs: Axes that the parameter produces.
    stack: Leading axes over which parameters are merely stacked ('layers').
  """

  inputs: tuple[str, ...] = ()
  outputs: tuple[str, ...] = ()
  stack: tuple[str, ...] = ()

  @property
  def names(self) -> tuple[str, ...]:
    """One name per array dimension."""
    return self.stack + self.inputs + self.outputs

  @property
  def is_matrix(self) -> bool:
    """Whether the parameter has both inputs and outputs."""
    return bool(self.inputs) and bool(self.outputs)

  def stacked(self, name: str) -> 'LogicalAxes':
    """The same axes behind one more leading axis.

    Args:
      name: Of the new axis.
    """
    return dataclasses.replace(self, stack=(name, *self.stack))
