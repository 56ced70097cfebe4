"""The first knob to turn when a run does not fit in memory."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from efficient_llm.training import pretrain, units

# Dotted field of the configuration -> value, as on the command line.
Changes = dict[str, Any]
# Mesh axis -> devices along it.
Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Trial:
  """What compiling a configuration gave; None where that is not known."""

  fits: bool | None
  peak_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Remedy:
  """What to change.

  Attributes:
    flags: Command-line flags, the first knob first; all of them together fit
      if `fits` says so.
    fits: Whether a compilation with these flags fitted.
    reason: How that is known.
  """

  flags: tuple[str, ...]
  fits: bool
  reason: str


def find(
  config: pretrain.PretrainConfig,
  sizes: Sizes,
  *,
  now: Trial,
  state_bytes: int,
  limit_bytes: int | None,
  compile_trial: Callable[[pretrain.PretrainConfig], Trial | None],
  max_trials: int,
) -> Remedy:
  """Turns knobs, those that cost least first, until a compilation fits.

  A knob that helps stays turned while the next is tried. Where the state alone
  fills a device, knobs that only save activations are passed over.

  Args:
    config: The run that does not fit.
    sizes: The mesh it was compiled for.
    now: What compiling it gave.
    state_bytes: Parameters and moments, over all devices.
    limit_bytes: What a device has, where known.
    compile_trial: Compiles a configuration; None for one that is not legal.
    max_trials: How many times at most.
  """
  flags: Changes = {}
  peak = now.peak_bytes
  trials_left = max_trials
  fixed = _persistent_bytes(state_bytes, sizes)
  for knob in _knobs(limit_bytes is not None and fixed > limit_bytes):
    for changes in knob(config, sizes):
      if trials_left == 0:
        break
      changed = _changed(config, changes)
      result = compile_trial(changed)
      if result is None:
        break
      trials_left -= 1
      if not result.fits and _is_no_better(result.peak_bytes, peak):
        break
      flags |= changes
      config, peak = changed, result.peak_bytes
      if result.fits:
        needs = 'fits' if peak is None else f'needs {units.format_bytes(peak)}'
        return Remedy(_as_flags(flags), True, f'compiled: a device {needs}')
  return _more_devices(flags, state_bytes, limit_bytes, sizes)


def _knobs(
  state_fills_device: bool,
) -> list[Callable[[pretrain.PretrainConfig, Sizes], Iterator[Changes]]]:
  if state_fills_device:
    return [_share_state, _tensor]
  return [_remat, _microbatches, _share_state, _bfloat16, _tensor]


def _remat(config: pretrain.PretrainConfig, sizes: Sizes) -> Iterator[Changes]:
  del sizes
  if config.model.remat != 'full':
    yield {'model.remat': 'full'}


def _microbatches(
  config: pretrain.PretrainConfig, sizes: Sizes
) -> Iterator[Changes]:
  """Down to one row per device and microbatch."""
  parts = config.loop.num_microbatches
  rows = config.data.batch_size // (sizes['data'] * sizes['fsdp'])
  while rows % (2 * parts) == 0:
    parts *= 2
    yield {'loop.num_microbatches': parts}


def _share_state(
  config: pretrain.PretrainConfig, sizes: Sizes
) -> Iterator[Changes]:
  """Cuts the state into more parts instead of keeping copies of it."""
  del config
  if sizes['data'] > 1:
    yield {'mesh.data': 1, 'mesh.fsdp': -1}


def _bfloat16(
  config: pretrain.PretrainConfig, sizes: Sizes
) -> Iterator[Changes]:
  del sizes
  if config.model.dtype != 'bfloat16':
    yield {'model.dtype': 'bfloat16'}


def _tensor(config: pretrain.PretrainConfig, sizes: Sizes) -> Iterator[Changes]:
  del config
  size = 2 * sizes['tensor']
  while math.prod(sizes.values()) % size == 0:
    yield {'mesh.fsdp': -1, 'mesh.tensor': size}
    size *= 2


def _more_devices(
  flags: Changes, state_bytes: int, limit_bytes: int | None, sizes: Sizes
) -> Remedy:
  """By arithmetic: activations per device do not grow with the mesh."""
  reason = 'compiled: not enough' if flags else 'no knob that was tried helps'
  num_devices = 2 * math.prod(sizes.values())
  if limit_bytes is not None:
    # Leaves half of the memory to activations.
    parts = 2 * _persistent_bytes(state_bytes, None) / limit_bytes
    num_devices = max(num_devices, 2 ** math.ceil(math.log2(max(parts, 1))))
  return Remedy(
    _as_flags(flags),
    False,
    f'{reason}: take about {num_devices} devices (by arithmetic, state and '
    'gradients in half the memory) or a smaller model',
  )


def _persistent_bytes(state_bytes: int, sizes: Sizes | None) -> float:
  """State and gradients: parameters are a third of what Adam keeps."""
  parts = 1 if sizes is None else sizes['fsdp'] * sizes['tensor']
  return state_bytes * 4 / 3 / parts


def _is_no_better(peak: int | None, before: int | None) -> bool:
  return peak is not None and before is not None and peak >= before


def _changed(
  config: pretrain.PretrainConfig, changes: Changes
) -> pretrain.PretrainConfig:
  for name, value in changes.items():
    group, field = name.split('.')
    part = dataclasses.replace(getattr(config, group), **{field: value})
    config = dataclasses.replace(config, **{group: part})
  return config


def _as_flags(changes: Changes) -> tuple[str, ...]:
  return tuple(f'--config.{name}={value}' for name, value in changes.items())
