"""A fixture for tests that build the same program more than once."""

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache


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
