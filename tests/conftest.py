"""Settings shared by every test: the --slow option and hypothesis."""

import hypothesis
import pytest

# The first example of a property often compiles, so time says nothing.
hypothesis.settings.register_profile('efficient_llm', deadline=None)
hypothesis.settings.load_profile('efficient_llm')


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption(
    '--slow', action='store_true', help='also run the tests marked slow'
  )


def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  if config.getoption('--slow'):
    return
  slow = [item for item in items if item.get_closest_marker('slow')]
  if slow:
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]
