import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import pytest

from efficient_llm import typing
from efficient_llm.typing import Array, Float, LogicalAxes


def test_names_stand_in_the_order_of_the_dimensions() -> None:
  axes = LogicalAxes(
    inputs=('embed',), outputs=('heads', 'head_dim'), stack=('layers',)
  )
  assert axes.names == ('layers', 'embed', 'heads', 'head_dim')


def test_stacking_adds_an_axis_in_front() -> None:
  axes = LogicalAxes(outputs=('embed',), stack=('layers',))
  assert axes.stacked('island').names == ('island', 'layers', 'embed')
  assert axes.stacked('island').outputs == axes.outputs


@pytest.mark.parametrize(
  ('inputs', 'outputs', 'expected'),
  [(('a',), ('b',), True), ((), ('b',), False), (('a',), (), False)],
)
def test_a_matrix_has_inputs_and_outputs(
  inputs: tuple[str, ...], outputs: tuple[str, ...], expected: bool
) -> None:
  axes = LogicalAxes(inputs=inputs, outputs=outputs, stack=('layers',))
  assert axes.is_matrix is expected


@typing.typed
def _product(x: Float[Array, 'B D'], y: Float[Array, 'D F']) -> Array:
  return x @ y


def test_typed_functions_take_arrays_of_fitting_shapes() -> None:
  assert _product(jnp.ones((2, 3)), jnp.ones((3, 4))).shape == (2, 4)


@pytest.mark.parametrize(
  ('x', 'y'),
  [
    (jnp.ones((2, 3)), jnp.ones((4, 4))),
    (jnp.ones((2, 3), int), jnp.ones((3, 4))),
    (jnp.ones(3), jnp.ones((3, 4))),
  ],
  ids=['other length', 'other type', 'other rank'],
)
def test_typed_functions_refuse_other_arrays(x: Array, y: Array) -> None:
  with pytest.raises(TypeError, match='_product'):
    _product(x, y)


@dataclasses.dataclass(frozen=True)
class _Config:
  kind: Literal['one', 'two'] = 'one'
  text: str = 'any'


def test_a_listed_choice_is_taken() -> None:
  typing.check_choices(_Config(kind='two', text='else'), name='part')


def test_a_choice_that_is_not_listed_is_refused() -> None:
  wrong: Any = {'kind': 'three'}
  with pytest.raises(ValueError) as caught:
    typing.check_choices(_Config(**wrong), name='part')
  assert str(caught.value) == "part.kind='three' must be one of one, two."
