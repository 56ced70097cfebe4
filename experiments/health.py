"""What can be wrong with a machine before a run: one check, one line."""

import dataclasses
import glob
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, Literal

Status = Literal['ok', 'warn', 'FAIL']

# Oldest version that works, and the series that the tests ran with.
_VERSIONS = {
  'jax': ((0, 10, 2), ('0.10', '0.11', '0.12')),
  'flax': ((0, 12, 6), ('0.12',)),
  'optax': ((0, 2, 8), ('0.2',)),
  'orbax-checkpoint': ((0, 12, 0), ('0.12',)),
  'grain': ((0, 2, 16), ('0.2',)),
}
_PYTHONS = ((3, 11), (3, 12), (3, 13))
_PLUGINS = {
  'tpu': ('libtpu',),
  'gpu': ('jax_cuda13_plugin', 'jax_cuda12_plugin', 'jax_rocm7_plugin'),
}
_DEVICE_FILES = {
  'tpu': ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*'),
  'gpu': ('/dev/nvidia[0-9]*', '/dev/kfd'),
}
_INSTALL = {
  'tpu': 'pip install -e .[tpu]',
  'gpu': 'pip install -e .[gpu]',
}
_VARIABLES = re.compile(
  r'(JAX_|XLA_|LIBTPU_|TPU_|NCCL_).*|(CUDA|ROCR)_VISIBLE_DEVICES'
)
# Switches that are set while hunting a bug and forgotten.
_SLOW = ('JAX_DISABLE_JIT', 'JAX_DEBUG_NANS', 'JAX_ENABLE_CHECKS')
_GIB = 2**30
_MIN_DISK_BYTES, _LOW_DISK_BYTES = _GIB // 10, 10 * _GIB
_LOW_MEMORY_BYTES = 2 * _GIB
# Another process, as a broken driver may hang or kill the one that asks.
_ASK_JAX = """
import json, jax
devices = jax.devices()
try:
  memory = devices[0].memory_stats()
except jax.errors.JaxRuntimeError:
  memory = None
print(json.dumps({
  'platform': jax.default_backend(), 'count': len(devices),
  'kind': devices[0].device_kind, 'memory': memory,
}))
"""


@dataclasses.dataclass(frozen=True)
class Check:
  """The outcome of one check.

  Attributes:
    message: What was found and, where it is not ok, what to do.
  """

  name: str
  status: Status
  message: str


def check_versions() -> Iterator[Check]:
  """Compares Python and the main libraries with what was tested."""
  found = f'{sys.version_info.major}.{sys.version_info.minor}'
  if sys.version_info[:2] in _PYTHONS:
    yield Check('python', 'ok', found)
  elif sys.version_info[:2] < _PYTHONS[0]:
    yield Check('python', 'FAIL', f'{found} is too old; use 3.11 to 3.13.')
  else:
    yield Check('python', 'warn', f'{found} is untested; use 3.11 to 3.13.')
  for name, (oldest, tested) in _VERSIONS.items():
    try:
      version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      yield Check(name, 'FAIL', f'is missing; run pip install {name}.')
      continue
    yield judge_version(name, version, oldest, tested)


def judge_version(
  name: str, version: str, oldest: tuple[int, ...], tested: tuple[str, ...]
) -> Check:
  """Says whether a version is too old, tested or neither."""
  numbers = tuple(int(number) for number in re.findall(r'\d+', version)[:3])
  if numbers < oldest:
    least = '.'.join(map(str, oldest))
    return Check(
      name,
      'FAIL',
      f"{version} is too old; run pip install '{name}>={least}'.",
    )
  if '.'.join(map(str, numbers[:2])) in tested:
    return Check(name, 'ok', version)
  return Check(
    name,
    'warn',
    f'{version} is untested; tested are {", ".join(tested)}.',
  )


def ask_jax(timeout_secs: float = 120.0) -> dict[str, Any] | str:
  """What JAX finds here, or in one line why it finds nothing."""
  # It must not take all of a GPU's memory while others use it.
  environment = {**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  try:
    answer = subprocess.run(
      [sys.executable, '-c', _ASK_JAX],
      capture_output=True,
      text=True,
      timeout=timeout_secs,
      env=environment,
      check=False,
    )
  except subprocess.TimeoutExpired:
    return f'JAX did not answer within {timeout_secs:.0f} s'
  if answer.returncode:
    lines = answer.stderr.strip().splitlines() or ['no message']
    return f'JAX failed with code {answer.returncode}: {lines[-1]}'
  return json.loads(answer.stdout.splitlines()[-1])


def check_devices(
  found: dict[str, Any] | str, *, want: str | None, num_devices: int | None
) -> Iterator[Check]:
  """Compares the devices found with those wanted; the CPU is no substitute."""
  if isinstance(found, str):
    yield Check('devices', 'FAIL', f'{found}; see the driver and plug-in.')
    return
  platform, count = found['platform'], found['count']
  summary = f'{count} x {found["kind"]} ({platform})'
  reason = _why_not_used(platform)
  if want is not None and platform != want:
    remedy = reason or f'run {_INSTALL.get(want, "with JAX_PLATFORMS=cpu")}'
    yield Check('devices', 'FAIL', f'{summary}, not {want}; {remedy}.')
  elif want is None and reason:
    yield Check(
      'devices', 'FAIL', f'{summary}, but {reason}; or pass --want=cpu.'
    )
  elif num_devices is not None and count != num_devices:
    remedy = 'see CUDA_VISIBLE_DEVICES, TPU_VISIBLE_CHIPS and the other hosts'
    if platform == 'cpu':
      remedy = (
        f'set XLA_FLAGS=--xla_force_host_platform_device_count={num_devices}'
      )
    yield Check('devices', 'FAIL', f'{summary}, not {num_devices}; {remedy}.')
  else:
    yield Check('devices', 'ok', summary)
  memory = found['memory']
  if memory and 'bytes_limit' in memory:
    free = memory['bytes_limit'] - memory.get('bytes_in_use', 0)
    status: Status = 'ok' if free >= _LOW_MEMORY_BYTES else 'warn'
    yield Check('device memory', status, f'{free / _GIB:.1f} GiB free')


def _why_not_used(platform: str) -> str | None:
  """Why an accelerator that seems to be here stands idle, and the remedy."""
  if platform != 'cpu':
    return None
  for kind, patterns in _DEVICE_FILES.items():
    present = [file for pattern in patterns for file in glob.glob(pattern)]
    plugins = [
      name for name in _PLUGINS[kind] if importlib.util.find_spec(name)
    ]
    forced = os.environ.get('JAX_PLATFORMS')
    what = present[0] if present else plugins[0] if plugins else None
    if what is None:
      continue
    if forced:
      return f'{what} is here and JAX_PLATFORMS={forced} hides it; unset that'
    if not plugins:
      return f'{what} is here without its plug-in; run {_INSTALL[kind]}'
    if not present:
      return f'{what} is installed and no {kind.upper()} is here; remove it'
    return f'{what} is here and JAX cannot use it; check its driver'
  return None


def check_host_memory() -> Iterator[Check]:
  """Looks for room in the host's memory."""
  try:
    text = pathlib.Path('/proc/meminfo').read_text(encoding='ascii')
  except OSError:
    return
  found = re.search(r'MemAvailable:\s+(\d+) kB', text)
  if found:
    free = int(found[1]) * 1024
    status: Status = 'ok' if free >= _LOW_MEMORY_BYTES else 'warn'
    yield Check('host memory', status, f'{free / _GIB:.1f} GiB free')


def check_disk(workdir: pathlib.Path) -> Iterator[Check]:
  """Looks for room at the working directory and writes there."""
  place = workdir.absolute()
  while not place.exists() and place != place.parent:
    place = place.parent
  try:
    with tempfile.TemporaryFile(dir=place) as file:
      file.write(b'x')
      file.flush()
    free = shutil.disk_usage(place).free
  except OSError as error:
    yield Check(
      'workdir',
      'FAIL',
      f'{workdir} cannot be written: {error.strerror}; choose another.',
    )
    return
  message = f'{workdir}: {free / _GIB:.1f} GiB free'
  if free < _MIN_DISK_BYTES:
    yield Check('workdir', 'FAIL', f'{message}; make room.')
  elif free < _LOW_DISK_BYTES:
    yield Check('workdir', 'warn', f'{message}, few for checkpoints.')
  else:
    yield Check('workdir', 'ok', message)


def check_environment() -> Iterator[Check]:
  """Lists the variables that change what JAX and XLA do."""
  for name, value in sorted(os.environ.items()):
    if not _VARIABLES.fullmatch(name):
      continue
    is_slow = name in _SLOW and value.lower() not in ('', '0', 'false')
    yield Check(
      name,
      'warn' if is_slow else 'ok',
      f'{value}; unset it, as it slows a run down.' if is_slow else value,
    )
