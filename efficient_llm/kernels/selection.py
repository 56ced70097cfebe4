"""What every operation's `choose` shares."""

import re
from typing import Literal, NamedTuple

Implementation = Literal['xla', 'pallas_tpu', 'pallas_gpu']

_HOPPER = re.compile(r'\bG?H(20|100|200|800)\b')


class Choice(NamedTuple):
  """An implementation, and in a sentence why it."""

  implementation: Implementation
  reason: str


def kernel_for(platform: str, device_kind: str) -> Implementation:
  """The implementation written for a device: 'xla' where there is none.

  Args:
    platform: As a device names it: 'cpu', 'gpu' or 'tpu'.
    device_kind: As a device names it, such as 'NVIDIA H200'.
  """
  if platform == 'tpu':
    return 'pallas_tpu'
  hopper = platform == 'gpu' and _HOPPER.search(device_kind)
  return 'pallas_gpu' if hopper else 'xla'


def decide(
  platform: str, device_kind: str, refusals: dict[Implementation, str | None]
) -> Choice:
  """The device's kernel if it takes the input, else XLA.

  Args:
    platform: As a device names it.
    device_kind: As a device names it.
    refusals: Why each kernel cannot take the input, if so.
  """
  kernel = kernel_for(platform, device_kind)
  if kernel == 'xla':
    device = f'{platform} {device_kind}'.strip()
    return Choice('xla', f'No kernel is written for {device}; XLA serves all.')
  refusal = refusals[kernel]
  if refusal:
    return Choice('xla', f'{kernel} is out: {refusal}.')
  return Choice(kernel, f'{kernel} is written for {platform} and takes this.')


def check(
  implementation: Implementation, refusals: dict[Implementation, str | None]
) -> Implementation:
  """Refuses an implementation that cannot take the input.

  Args:
    implementation: That was asked for.
    refusals: Why each kernel cannot take the input, if so.
  Raises:
    ValueError: Says why.
  """
  refusal = refusals.get(implementation)
  if refusal:
    raise ValueError(
      f'{implementation=} is out: {refusal}; leave it None to choose.'
    )
  return implementation
