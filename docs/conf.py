"""Settings of Sphinx: `sphinx-build -W -b html docs out/docs`."""

import importlib
import pathlib
import sys
from typing import Any

_DOCS = pathlib.Path(__file__).resolve().parent
# The reference is made of the project's modules, wherever Sphinx is started.
sys.path[:0] = [str(_DOCS), str(_DOCS.parent)]

project = 'efficient_llm'
copyright = 'the authors of efficient_llm, Apache-2.0'
release = importlib.import_module('efficient_llm').__version__

extensions = ['myst_parser']
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
exclude_patterns = ['__pycache__']

html_theme = 'sphinx_book_theme'
html_title = 'efficient_llm'


def setup(app: Any) -> None:
  """Has the configuration reference written when its page is read."""
  app.connect('source-read', _write_reference)


def _write_reference(app: Any, page: str, source: list[str]) -> None:
  del app
  if page == 'reference':
    reference = importlib.import_module('reference')
    source[0] = source[0].replace(reference.MARK, reference.render())
