import html.parser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficient_llm.training import sections

# A parser folds \r into \n, and HTML has neither NUL nor lone surrogates.
_TEXT = st.text(
  st.characters(exclude_characters='\r\0', exclude_categories=['Cs'])
)
_HOSTILE = st.one_of(
  _TEXT,
  st.sampled_from(
    [
      '<script>alert(1)</script>',
      '</pre><img src=x onerror=alert(1)>',
      '" onmouseover="alert(1)',
      "'><svg/onload=alert(1)>",
      '&lt;b&gt;',
      '</style></title><base href=x>',
    ]
  ),
)


class _Reader(html.parser.HTMLParser):
  """Collects what a browser would see."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.tags, self.attributes, self.text = [], [], ''
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_data(self, data):
    self.text += data


def _sections(text):
  """One of each kind, with `text` wherever text can go."""
  return [
    sections.Text(text, text),
    sections.KeyNumbers([sections.Tile(text, text, text, text)], title=text),
    sections.Table(text, [text, text], [[text, 1.0]], note=text),
    sections.Samples([sections.Sample(text, prompt=text)], title=text),
    sections.Configuration({text: {text: text}}, title=text),
  ]


@pytest.mark.parametrize('index', range(len(_sections(''))))
@given(text=_HOSTILE)
def test_no_text_changes_the_tags_of_a_section(index, text):
  plain = _Reader(_sections('x')[index].render())
  hostile = _Reader(_sections(text or 'x')[index].render())
  # Only Text makes tags from its content: one per paragraph.
  assert set(hostile.tags) <= set(plain.tags)
  assert set(hostile.attributes) <= set(plain.attributes)


@given(_HOSTILE, _HOSTILE)
def test_a_sample_reads_as_the_model_wrote_it(prompt, text):
  section = sections.Samples([sections.Sample(text, prompt=prompt)], title='')
  assert _Reader(section.render()).text == '\n' + prompt + text


def test_blank_lines_set_paragraphs_apart():
  reader = _Reader(sections.Text('', 'one\none\n\n \ntwo').render())
  assert reader.tags == ['section', 'p', 'p']


def test_settings_have_the_names_a_flag_would_set():
  section = sections.Configuration({'model': {'num_layers': 4, 'moe': {}}})
  text = _Reader(section.render()).text
  assert 'model.num_layers4' in text
  assert 'model.moe{}' in text


def test_settings_are_folded_away():
  assert 'open' not in dict(
    _Reader(sections.Configuration({'a': 1}).render()).attributes
  )


def test_numbers_of_a_table_stand_under_their_header_at_the_right():
  section = sections.Table('', ['name', 'loss'], [['a', 1.5], ['b', 10]])
  assert section.render().count('class="number"') == 3


def test_a_table_without_rows_keeps_its_header():
  assert 'loss' in sections.Table('', ['loss'], []).render()


def test_a_row_that_does_not_fit_its_header_is_refused():
  section = sections.Table('speed', ['a', 'b'], [[1, 2], [3]])
  with pytest.raises(ValueError, match="table 'speed' must have 2 cells"):
    section.render()
