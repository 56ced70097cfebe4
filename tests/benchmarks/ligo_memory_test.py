"""The papers' pairs of images compile for real chips, which takes no TPU."""

import importlib.util

import pytest

from benchmarks import ligo_memory
from efficient_llm.training import topology

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason='the TPU compiler (libtpu) is not installed',
  ),
]


@pytest.mark.parametrize('pair', ['deit', 'cait'])
def test_training_and_learning_fit_a_chip_at_full_size(pair: str) -> None:
  where = topology.load(topology.parse('v5e:2x2'))
  programs = ligo_memory.programs(where, pair)
  assert where.memory_limit_bytes is not None
  limit = where.memory_limit_bytes / 2**20
  for name in ('train_mib', 'learn_mib'):
    assert 0 < programs[name]() < limit
