"""Tests of topology names and of the local devices."""

import importlib.util

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from efficient_llm.training import topology


@pytest.mark.parametrize(
  ('text', 'chip', 'shape', 'num_slices'),
  [
    ('v5e:16x16', 'v5e', (16, 16), 1),
    ('v6e:4x4,slices=2', 'v6e', (4, 4), 2),
    ('v5p:4x4x4', 'v5p', (4, 4, 4), 1),
    ('h200:8', 'h200', (8,), 1),
    ('h100:16', 'h100', (16,), 1),
    ('local', None, (), 1),
  ],
)
def test_a_name_is_read(
  text: str, chip: str | None, shape: tuple[int, ...], num_slices: int
) -> None:
  name = topology.parse(text)
  assert (name.chip, name.shape, name.num_slices) == (chip, shape, num_slices)


@pytest.mark.parametrize(
  ('text', 'remedy'),
  [
    ('v7:4x4', 'v5p:4x4x4'),
    ('', 'local'),
    ('v5e', 'v5e:16x16'),
    ('v5e:4', 'v5e:4x4'),
    ('v5p:4x4', 'v5p:4x4x4'),
    ('v5e:0x4', 'positive'),
    ('v5e:4x4,slices=0', 'positive'),
    ('h200:8,slices=2', 'leave them out'),
    ('h100:12', 'h100:16'),
  ],
)
def test_another_name_is_refused_with_a_remedy(text: str, remedy: str) -> None:
  with pytest.raises(ValueError, match=remedy) as raised:
    topology.parse(text)
  assert '\n' not in str(raised.value)


@hypothesis.given(st.text(max_size=20))
def test_no_text_breaks_the_reader(text: str) -> None:
  try:
    topology.parse(text)
  except ValueError as error:
    assert 'topology' in str(error) or 'must' in str(error)


def test_the_local_topology_is_what_jax_has() -> None:
  found = topology.load(topology.parse('local'))
  assert list(found.devices) == jax.devices()
  assert len(found.granules) == len(found.devices)


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is not None, reason='libtpu is installed'
)
def test_without_the_tpu_compiler_the_remedy_is_its_installation() -> None:
  with pytest.raises(ValueError, match=r'pip install "jax\[tpu\]=='):
    topology.load(topology.parse('v5e:2x2'))


@pytest.mark.skipif(
  any(
    importlib.util.find_spec(f'jax_cuda{major}_plugin') for major in (12, 13)
  ),
  reason='a CUDA plug-in is installed',
)
def test_without_the_cuda_compiler_the_remedy_is_its_installation() -> None:
  with pytest.raises(ValueError, match='pip install jax-cuda13-plugin=='):
    topology.load(topology.parse('h200:8'))
