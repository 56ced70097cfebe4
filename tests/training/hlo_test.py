"""Tests of reading compiled programs, on programs compiled here."""

import re

import jax
import jax.numpy as jnp
import pytest

from efficient_llm.training import hlo

_CUSTOM_CALL = """HloModule step

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %kernel = f32[4]{0} custom-call(%x), backend_config={"a": "b
}}, metadata={op_name="first = second("}
  ROOT %y = (f32[4]{0}, /*index=1*/s32[]) add(%kernel, %x)
}
"""


def _text(*, inner: int, outer: int) -> str:
  """A program with a loop in a loop."""

  def body(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
    more = jax.lax.scan(
      lambda x, _: (jnp.sin(x) @ x, None), carry, length=inner
    )
    return more[0], None

  def program(x: jax.Array) -> jax.Array:
    return jax.lax.scan(body, x, length=outer)[0]

  text = jax.jit(program).lower(jnp.ones((8, 8))).compile().as_text()
  assert text is not None
  return text


@pytest.fixture(scope='module', name='text')
def text_fixture() -> str:
  return _text(inner=5, outer=3)


def _runs_of_products(text: str) -> int:
  program = hlo.parse(text)
  return sum(
    times
    for _, instruction, times in program.executed()
    if 'dot_general' in instruction.attributes
  )


def test_a_loop_in_a_loop_counts_the_product_of_their_lengths(
  text: str,
) -> None:
  assert _runs_of_products(text) % 15 == 0
  assert hlo.parse(text).num_unknown_loops == 0
  assert 15 in hlo.parse(text).runs.values()


def test_the_length_is_read_off_the_condition_where_it_is_not_stated(
  text: str,
) -> None:
  silent = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', '', text)
  assert 'known_trip_count' not in silent
  # CPU programs wrap the comparison in a fusion, TPU programs do not.
  plain = _with_plain_conditions(silent)
  assert hlo.parse(plain).runs == hlo.parse(text).runs
  assert hlo.parse(plain).num_unknown_loops == 0


def _with_plain_conditions(text: str) -> str:
  return re.sub(
    r'pred\[\] fusion\((%[\w.-]+), (%[\w.-]+)\), kind=kLoop, '
    r'calls=%wrapped_compare[\w.-]*',
    r'pred[] compare(\1, \2), direction=LT',
    text,
  )


def test_a_loop_of_unknown_length_is_reported(text: str) -> None:
  silent = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', '', text)
  assert 'direction=LT' in silent
  program = hlo.parse(silent.replace('direction=LT', 'direction=NE'))
  assert program.num_unknown_loops == 2


def test_a_kernel_s_description_of_several_lines_is_no_end() -> None:
  program = hlo.parse(_CUSTOM_CALL)
  names = list(program.computations['main'].instructions)
  assert names == ['x', 'kernel', 'y']
  assert program.computations['main'].root.operands == ('kernel', 'x')


def test_text_without_a_program_is_refused() -> None:
  with pytest.raises(ValueError, match='ENTRY'):
    hlo.parse('HloModule nothing')


@pytest.mark.parametrize(
  ('shape', 'expected'),
  [
    ('f32[]', 4),
    ('bf16[2,3]{1,0:T(8,128)(2,1)}', 12),
    ('pred[7]{0}', 7),
    ('s4[3]{0}', 2),
    ('f8e4m3fn[5]{0}', 5),
    ('(f32[2]{0}, /*index=1*/(s32[3]{0}, token[]))', 20),
  ],
)
def test_bytes_of_a_shape(shape: str, expected: int) -> None:
  assert hlo.num_bytes(shape) == expected


def test_vector_memory_of_a_tpu_is_not_main_memory() -> None:
  shape = '(f32[4]{0:T(128)S(1)}, f32[8]{0:T(128)})'
  assert hlo.num_bytes(shape) == 48
  assert hlo.num_bytes(shape, main_memory_only=True) == 32


def test_a_tuple_shape_has_its_parts() -> None:
  assert hlo.elements('((f32[2,2]{1,0}, s32[]), f32[1]{0:T(1,2)})') == [
    '(f32[2,2]{1,0}, s32[])',
    'f32[1]{0:T(1,2)}',
  ]
