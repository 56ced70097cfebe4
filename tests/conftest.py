"""Settings of every test: --slow, how programs are compiled, hypothesis."""

import os
from collections.abc import Iterator

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

# The first example of a property often compiles, so time says nothing.
hypothesis.settings.register_profile('efficient_llm', deadline=None)
hypothesis.settings.load_profile('efficient_llm')


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption(
    '--slow', action='store_true', help='also run the tests marked slow'
  )


def pytest_configure(config: pytest.Config) -> None:
  # Most of the suite's time was LLVM's optimisations of programs that run for
  # milliseconds; without them it takes half. XLA's own passes stay.
  if not config.getoption('--slow'):
    jax.config.update('jax_disable_most_optimizations', True)
    # For the processes that tests start.
    os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'


def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  if config.getoption('--slow'):
    return
  slow = [item for item in items if item.get_closest_marker('slow')]
  if slow:
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture
def optimized(request: pytest.FixtureRequest) -> Iterator[None]:
  """Compiles a test's programs as users get them: for equality of bits."""
  jax.clear_caches()
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  if not request.config.getoption('--slow'):
    jax.config.update('jax_disable_most_optimizations', True)
  jax.clear_caches()


@pytest.fixture(scope='module')
def compilation_cache(
  tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
  """Compiles equal programs of a module's tests once."""
  fields = {
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('programs')),
    'jax_persistent_cache_min_compile_time_secs': 0.05,
  }
  before = {name: getattr(jax.config, name) for name in fields}
  jax_cache.reset_cache()
  for name, value in fields.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  jax_cache.reset_cache()
