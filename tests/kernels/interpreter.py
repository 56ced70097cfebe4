"""The strict TPU interpreter, and whether it found a race.

Interpreted kernels are called outside `jax.jit`: two in one program have been
seen to wait for each other for ever.
"""

from collections.abc import Iterator

import pytest
from jax.experimental.pallas import tpu as pltpu

STRICT = pltpu.InterpretParams(
  detect_races=True, uninitialized_memory='nan', out_of_bounds_reads='raise'
)


@pytest.fixture
def no_race(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
  """Fails a test whose kernel races: the interpreter only prints it."""
  yield
  # What a kernel that raised has left must not meet the next one.
  pltpu.reset_tpu_interpret_mode_state()
  printed = capfd.readouterr()
  assert 'RACE' not in printed.out + printed.err
