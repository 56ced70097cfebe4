"""Published variants, each as a change of settings."""

import dataclasses
from collections.abc import Callable
from typing import Any

from efficient_llm.diloco.compression import CompressionConfig
from efficient_llm.diloco.config import DilocoConfig
from efficient_llm.diloco.fragments import FragmentConfig
from efficient_llm.diloco.outer import OuterConfig


def apply(name: str, config: DilocoConfig) -> DilocoConfig:
  """A configuration with what makes up a variant, all else unchanged.

  Args:
    name: One of `NAMES`.
    config: Model, data, islands, sync period and so on.
  Raises:
    ValueError: If there is no such name; lists the names there are.
  """
  if name not in _VARIANTS:
    raise ValueError(
      f'Unknown variant {name!r}; choose one of {", ".join(NAMES)}.'
    )
  return _VARIANTS[name](config)


def _with(**changes: Any) -> Callable[[DilocoConfig], DilocoConfig]:
  return lambda config: dataclasses.replace(config, **changes)


def _streaming(config: DilocoConfig) -> DilocoConfig:
  """Rate and mixing as published; three layers to a fragment."""
  count = max(1, min(config.model.num_layers // 3, config.sync_period))
  count = max(count, min(2, config.model.num_layers, config.sync_period))
  return dataclasses.replace(
    config,
    outer=OuterConfig(learning_rate=0.4),
    fragments=FragmentConfig(
      count=count,
      overlap_steps=min(5, config.sync_period - 1),
      mixing=0.5,
    ),
    compression=CompressionConfig('e3m0'),
  )


def _muloco(config: DilocoConfig) -> DilocoConfig:
  return dataclasses.replace(
    config,
    optimizer=dataclasses.replace(config.optimizer, name='muon'),
    outer=OuterConfig(momentum=0.6),
  )


def _data_parallel(config: DilocoConfig) -> DilocoConfig:
  """One island that sees the rows of all."""
  batch_size = config.data.batch_size * config.islands
  return dataclasses.replace(
    config,
    islands=1,
    data=dataclasses.replace(config.data, batch_size=batch_size),
    outer=OuterConfig('sgd', 1.0),
  )


_VARIANTS: dict[str, Callable[[DilocoConfig], DilocoConfig]] = {
  # Douillard et al. 2023, arXiv:2311.08105.
  'diloco': _with(),
  # Douillard et al. 2025, arXiv:2501.18512.
  'streaming': _streaming,
  # Kale et al. 2025, arXiv:2502.12996.
  'eager': _with(method='eager'),
  # Liu et al. 2024, arXiv:2401.09135.
  'delayed': _with(method='delayed', outer=OuterConfig('delayed_nesterov')),
  # Therien et al. 2025, arXiv:2505.23725.
  'muloco': _muloco,
  # Sarfi et al. 2025, arXiv:2508.15706. Differs: four-bit values, blocks along
  # rows.
  'sparseloco': _with(
    outer=OuterConfig('sgd', 1.0),
    compression=CompressionConfig(
      'int4', block_size=4096, density=128 / 4096, error_decay=0.95
    ),
  ),
  # Kolehmainen et al. 2025, arXiv:2506.10911.
  'noloco': _with(method='noloco', outer=OuterConfig(momentum=0.5)),
  # McMahan et al. 2017 (FedAvg), arXiv:1602.05629.
  'local_sgd': _with(outer=OuterConfig('sgd', 1.0)),
  'data_parallel': _data_parallel,
}

NAMES = tuple(_VARIANTS)
