"""Tests of the rules across a configuration, and of variants by name."""

import dataclasses
import pathlib
from typing import Any

import pytest

from efficient_llm.diloco import variants
from efficient_llm.diloco.compression import CompressionConfig
from efficient_llm.diloco.config import DilocoConfig, MembershipConfig
from efficient_llm.diloco.fragments import FragmentConfig
from efficient_llm.diloco.outer import OuterConfig
from efficient_llm.diloco.screening import ScreeningConfig
from experiments.configs import diloco_cpu, diloco_tpu_v5e
from tests.diloco import islands


def _config(**changes: Any) -> DilocoConfig:
  return islands.config(pathlib.Path('text.txt'), **changes)


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'islands': 0}, 'islands=0 must be at least 1'),
    ({'sync_period': 0}, 'sync_period=0 must be at least 1'),
    ({'method': 'gossip'}, 'config.method'),
    ({'fragments': FragmentConfig(2)}, r'fragments.count=2 must be in \[1, 1'),
    ({'fragments': FragmentConfig(1, 3)}, 'overlap_steps=3 must be'),
    ({'fragments': FragmentConfig(1, 0, 2.0)}, 'fragments.mixing=2.0 must'),
    (
      {'membership': MembershipConfig(drop_probability=1.0)},
      'drop_probability=1.0 must',
    ),
    ({'membership': MembershipConfig(absences=('1:2',))}, 'ISLAND:FIRST:LAST'),
    ({'membership': MembershipConfig(absences=('2:1:2',))}, 'one of 2 islands'),
    ({'membership': MembershipConfig(speeds=(1.0,))}, 'one for each of 2'),
    ({'membership': MembershipConfig(speeds=(1.0, 0.0))}, 'must be positive'),
    (
      {'outer': OuterConfig('delayed_nesterov')},
      "set method='delayed'",
    ),
    (
      {'method': 'eager', 'fragments': FragmentConfig(1, 1)},
      "method='eager' sends the model whole",
    ),
    (
      {'method': 'noloco', 'compression': CompressionConfig('int4')},
      "set outer.optimizer='nesterov' and compression.format='float32'",
    ),
    (
      {
        'islands': 3,
        'method': 'delayed',
        'screening': ScreeningConfig(merge='trimmed_mean'),
      },
      "set screening.merge='mean'",
    ),
  ],
)
def test_a_rule_that_is_broken_is_told_in_one_line(
  changes: dict[str, Any], expected: str
) -> None:
  with pytest.raises(ValueError, match=expected) as error:
    _config(**changes).validate()
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', variants.NAMES)
def test_every_variant_makes_a_valid_run(name: str) -> None:
  diloco_cpu.get_config(name).validate()


def test_an_unknown_variant_is_refused_with_the_names_there_are() -> None:
  with pytest.raises(ValueError, match='choose one of diloco, streaming'):
    variants.apply('fast', _config())


def test_data_parallel_sees_as_many_rows_on_one_island() -> None:
  config = _config()
  parallel = variants.apply('data_parallel', config)
  assert parallel.islands == 1
  assert parallel.data.batch_size == 2 * config.data.batch_size
  assert (
    dataclasses.replace(
      parallel, islands=2, data=config.data, outer=config.outer
    )
    == config
  )


def test_the_configuration_for_slices_keeps_the_rules() -> None:
  config = diloco_tpu_v5e.get_config()
  config.validate()
  assert config.mesh.island == config.islands == 4
  assert config.compression.format == 'e3m0'
