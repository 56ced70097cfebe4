"""Tests of the typed overrides: what is taken, and what refusals say."""

import dataclasses
import math
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from efficient_llm.training import pretrain
from experiments import overrides

_CHOICES = ('cosine', 'wsd', '1')


@dataclasses.dataclass(frozen=True)
class Inner:
  whole: int = 1
  number: float = 0.5
  flag: bool = False
  text: str = 'a'
  choice: Literal['cosine', 'wsd', '1'] = 'cosine'


@dataclasses.dataclass(frozen=True)
class Outer:
  inner: Inner = Inner()
  maybe_whole: int | None = None
  maybe_number: float | None = None
  maybe_text: str | None = None
  wholes: tuple[int, ...] = ()
  numbers: tuple[float, ...] = ()
  texts: tuple[str, ...] = ()
  whole: int = 2


_WHOLES = st.integers()
_NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
_VALUES = {
  'inner.whole': _WHOLES,
  'inner.number': _NUMBERS,
  'inner.flag': st.booleans(),
  'inner.text': st.text(),
  'inner.choice': st.sampled_from(_CHOICES),
  'maybe_whole': st.none() | _WHOLES,
  'maybe_number': st.none() | _NUMBERS,
  'maybe_text': st.none()
  | st.text().filter(lambda x: x.strip().lower() not in ('none', 'null')),
  'wholes': st.lists(_WHOLES).map(tuple),
  'numbers': st.lists(_NUMBERS).map(tuple),
  'texts': st.lists(st.text()).map(tuple),
  'whole': _WHOLES,
}


def _get(config: Any, name: str) -> Any:
  for part in name.split('.'):
    config = getattr(config, part)
  return config


def _refusal(changes: dict[str, str], config: Any = None) -> str:
  with pytest.raises(ValueError, match=r'.') as error:
    overrides.apply_overrides(config or Outer(), changes)
  return str(error.value)


@given(st.data(), st.sampled_from(sorted(_VALUES)))
def test_any_value_written_as_text_comes_back(
  data: st.DataObject, name: str
) -> None:
  value = data.draw(_VALUES[name])
  changed = overrides.apply_overrides(Outer(), {name: str(value)})
  assert _get(changed, name) == value
  assert type(_get(changed, name)) is type(value)
  assert dataclasses.replace(Outer(), **_others(changed, name)) == Outer()


def _others(config: Outer, name: str) -> dict[str, Any]:
  """The fields that an override of `name` must not touch."""
  top, _, rest = name.partition('.')
  fields = {field.name for field in dataclasses.fields(config)} - {top}
  others = {field: getattr(config, field) for field in fields}
  if rest:
    inner = dataclasses.replace(config.inner, **{rest: _get(Outer(), name)})
    others['inner'] = inner
  return others


@given(st.text(), st.text())
@example('wholes', '[' * 5000)
@example('texts', "('a'")
@example('texts', '{}[0]')
@example('wholes', '(1, None)')
@example('wholes', '-' * 5000 + '1')
@example('whole', '1' * 5000)
@example('whole', '1e999')
@example('inner.number', 'nan')
@example('inner.', '1')
@example('', '')
@example('inner.whole.x', 'a\nb')
@example('a.data\n', '1')
def test_junk_is_refused_in_one_line_or_taken(name: str, text: str) -> None:
  try:
    overrides.apply_overrides(Outer(), {name: text})
  except ValueError as error:
    assert len(str(error).splitlines()) == 1
    assert str(error).startswith('--config.')


@given(st.sampled_from(sorted(_VALUES)), st.text())
def test_junk_for_a_field_is_refused_in_one_line_or_of_its_type(
  name: str, text: str
) -> None:
  try:
    changed = overrides.apply_overrides(Outer(), {name: text})
  except ValueError as error:
    assert len(str(error).splitlines()) == 1
    assert f'--config.{name}=' in str(error)
  else:
    overrides.check_types(changed)


@given(
  st.sampled_from(sorted(overrides.field_names(pretrain.PretrainConfig())))
)
def test_every_field_of_a_run_takes_its_own_value_as_text(name: str) -> None:
  config = pretrain.PretrainConfig()
  text = str(_get(config, name))
  assert overrides.apply_overrides(config, {name: text}) == config


@pytest.mark.parametrize(
  ('text', 'value'),
  [('1e9', 10**9), ('1_000', 1000), ('2.0', 2), ('-3', -3), (' 7 ', 7)],
)
def test_whole_numbers_may_be_written_in_many_ways(
  text: str, value: int
) -> None:
  changed = overrides.apply_overrides(Outer(), {'whole': text})
  assert changed.whole == value
  assert type(changed.whole) is int


@pytest.mark.parametrize('text', ['1.5', '1e-3', '1e17', 'inf', 'nan', 'one'])
def test_what_is_not_surely_a_whole_number_is_refused(text: str) -> None:
  assert 'must be a whole number' in _refusal({'whole': text})


@pytest.mark.parametrize('text', ['nan', 'inf', '-inf', '1e999'])
def test_numbers_that_are_not_finite_are_refused(text: str) -> None:
  assert 'must be a number' in _refusal({'inner.number': text})


@pytest.mark.parametrize('text', ['true', 'True', '1', 'YES'])
def test_truth_may_be_written_in_many_ways(text: str) -> None:
  assert overrides.apply_overrides(Outer(), {'inner.flag': text}).inner.flag


def test_tuples_may_be_written_with_commas() -> None:
  changed = overrides.apply_overrides(
    Outer(), {'wholes': '1, 2,3', 'texts': 'a b,c', 'numbers': ''}
  )
  assert changed.wholes == (1, 2, 3)
  assert changed.texts == ('a b', 'c')
  assert changed.numbers == ()


def test_none_may_be_written_where_it_is_allowed() -> None:
  config = Outer(maybe_whole=3)
  changed = overrides.apply_overrides(config, {'maybe_whole': 'None'})
  assert changed.maybe_whole is None
  assert 'must be a whole number;' in _refusal({'whole': 'None'})


def test_a_mistyped_field_is_refused_with_the_near_name() -> None:
  assert 'did you mean maybe_whole or' in _refusal({'mayb_whole': '1'})
  assert 'did you mean inner.number?' in _refusal({'inner.numbr': '1'})


def test_a_field_in_the_wrong_group_is_refused_with_its_full_name() -> None:
  config = pretrain.PretrainConfig()
  for wrong in ('batch_size', 'model.batch_size', 'loop.checkpoint.batch_size'):
    message = _refusal({wrong: '8'}, config)
    assert f'--config.{wrong} is not a field' in message
    assert 'did you mean data.batch_size?' in message
  message = _refusal({'loop.every_steps': '8'}, config)
  assert 'did you mean loop.checkpoint.every_steps?' in message


def test_no_suggestion_is_made_twice() -> None:
  message = _refusal({'modl.num_layers': '8'}, pretrain.PretrainConfig())
  assert message.count('model.num_layers') == 1


def test_a_field_like_no_other_is_refused_with_where_to_look() -> None:
  assert '--print_config shows' in _refusal({'zzzzzzzz': '1'})


def test_a_group_is_refused_with_one_of_its_fields() -> None:
  message = _refusal({'inner': '1'})
  assert 'is a group of fields' in message
  assert '--config.inner.whole' in message


def test_a_name_that_goes_on_behind_a_field_is_refused_with_the_field() -> None:
  assert 'set --config.inner.whole.' in _refusal({'inner.whole.x.y': '1'})


def test_a_choice_that_is_none_is_refused_with_all_choices() -> None:
  message = _refusal({'inner.choice': 'Cosine'})
  assert 'must be one of cosine, wsd, 1' in message


def test_groups_in_a_list_need_a_configuration_file() -> None:
  @dataclasses.dataclass(frozen=True)
  class Several:
    inners: tuple[Inner, ...] = ()

  hint = tuple[Inner, ...]
  with pytest.raises(ValueError, match='set it in a configuration file'):
    overrides.parse('3', hint, name='inners')
  overrides.check_types(Several((Inner(),)))


def test_a_long_value_is_cut_in_the_message() -> None:
  assert len(_refusal({'whole': 'x' * 10_000})) < 300


def test_the_last_of_two_overrides_is_not_undone_by_the_first() -> None:
  changes = {'inner.whole': '5', 'inner.number': '2'}
  changed = overrides.apply_overrides(Outer(), changes)
  assert (changed.inner.whole, changed.inner.number) == (5, 2.0)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('whole', 1.5),
    ('whole', True),
    ('whole', '3'),
    ('whole', None),
    ('maybe_number', math.nan),
    ('maybe_number', '0.1'),
    ('wholes', [1, 2]),
    ('wholes', (1, '2')),
    ('texts', 'abc'),
    ('inner', None),
  ],
)
def test_a_value_of_another_type_in_a_configuration_file_is_refused(
  field: str, value: Any
) -> None:
  config = dataclasses.replace(Outer(), **{field: value})
  with pytest.raises(ValueError, match=rf'^config\.{field}=.*must be') as error:
    overrides.check_types(config)
  assert '\n' not in str(error.value)


def test_a_wrong_choice_deep_in_a_configuration_file_is_refused() -> None:
  wrong: dict[str, Any] = {'choice': 'Wsd'}
  inner = dataclasses.replace(Inner(), **wrong)
  with pytest.raises(ValueError, match=r'config\.inner\.choice'):
    overrides.check_types(Outer(inner=inner))


def test_the_default_configuration_of_a_run_passes_the_type_check() -> None:
  overrides.check_types(pretrain.PretrainConfig())
