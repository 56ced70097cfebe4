"""Settings of every test: --slow, how programs are compiled, hypothesis."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

import hypothesis
import jax
import pytest

# The first example of a property often compiles, so time says nothing.
hypothesis.settings.register_profile('efficient_llm', deadline=None)
hypothesis.settings.load_profile('efficient_llm')

_PROGRAMS = 'EFFICIENT_LLM_TEST_PROGRAMS'


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
    # These emitters take more than half of the compile time that is left.
    # Later compilers have no others, and end at a flag they do not know.
    if jax.__version_info__ < (0, 11):
      os.environ['XLA_FLAGS'] = ' '.join(
        (os.environ.get('XLA_FLAGS', ''), '--xla_cpu_use_fusion_emitters=false')
      ).strip()
  # Equal programs are compiled once, by whichever process is first.
  if not hasattr(config, 'workerinput'):
    folder = tempfile.mkdtemp(prefix='programs')
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ[_PROGRAMS] = folder
  jax.config.update('jax_compilation_cache_dir', os.environ[_PROGRAMS])
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)


def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  if config.getoption('--slow'):
    return
  slow = [item for item in items if item.get_closest_marker('slow')]
  if slow:
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


def pytest_collection_finish() -> None:
  # Tracing makes many objects and hardly any garbage in cycles: a tenth of the
  # time was spent looking for some among all that was imported.
  gc.freeze()
  gc.set_threshold(100_000, 20, 100)


@pytest.fixture
def optimized(request: pytest.FixtureRequest) -> Iterator[None]:
  """Compiles a test's programs with all optimisations: for equality of bits.

  As users get them, but for the emitters without --slow.
  """
  jax.clear_caches()
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  if not request.config.getoption('--slow'):
    jax.config.update('jax_disable_most_optimizations', True)
  jax.clear_caches()
