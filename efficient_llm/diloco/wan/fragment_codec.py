"""A fragment of the model on its way: encoded, named, checked, hashed.

A fragment is a flat dict of float32 numpy arrays by leaf name. All arithmetic
here runs on the CPU, so that hub and islands of any kind get the same bits.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm.diloco import compression
from efficient_llm.diloco.wan import messages

Fragment = dict[str, np.ndarray]
_PARTS = ('codes', 'scales', 'indices')
# For the header of a message.
_HEADROOM_BYTES = 4 << 20

# Compiled once for the shapes of a fragment, by all codecs of a process.
_compress = functools.partial(jax.jit, static_argnames='config')(
  compression.compress
)
_decode = jax.jit(compression.decode_tree)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
  """Computes on the CPU, whatever an island trains on."""
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    yield


class Codec:
  """Encodes updates of fragments, and refuses what is not one.

  Args:
    config: The format.
    shapes_P: Shapes by leaf name, of each fragment.
  """

  def __init__(
    self,
    config: compression.CompressionConfig,
    shapes_P: Sequence[Mapping[str, tuple[int, ...]]],
  ):
    self._config, self._shapes_P = config, list(shapes_P)
    self._encoded_P = [
      {
        name: jax.eval_shape(
          lambda x: compression.encode(x, config),
          jax.ShapeDtypeStruct(shape, np.float32),
        )
        for name, shape in shapes.items()
      }
      for shapes in shapes_P
    ]

  def num_bytes(self, fragment: int) -> int:
    """Bytes of a fragment's arrays as they are sent."""
    return compression.num_bytes(self._encoded_P[fragment])

  def compile_compress(self) -> None:
    """Compiles for all fragments, so that no update waits for it."""
    for shapes in self._shapes_P:
      nothing = {name: np.zeros(x, np.float32) for name, x in shapes.items()}
      self.compress(nothing, nothing if self._config.has_residual else None)

  def compile_decode(self) -> None:
    """Compiles for all fragments, so that no update waits for it."""
    for encoded in self._encoded_P:
      nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), encoded)
      with on_cpu():
        _decode(nothing)

  def compress(
    self, delta: Fragment, residual: Fragment | None
  ) -> tuple[Fragment, Fragment, Fragment | None]:
    """Encodes an update together with what its sender owes.

    Args:
      delta: The update.
      residual: What was not sent before; None without error feedback.

    Returns:
      Arrays to send, the update as everybody decodes it, the new residual.
    """
    with on_cpu():
      encoded, decoded, residual = jax.device_get(
        _compress(delta, residual, config=self._config)
      )
    arrays = {}
    for name, leaf in encoded.items():
      for part in _PARTS:
        values = getattr(leaf, part)
        if values is not None:
          arrays[f'{name}/{part}'] = _as_plain(values)
    return arrays, decoded, residual

  def decode(self, arrays: Mapping[str, np.ndarray], fragment: int) -> Fragment:
    """The update that arrays encode.

    Raises:
      messages.MessageError: If they are not those of this fragment.
    """
    encoded, known = {}, set()
    for name, wanted in self._encoded_P[fragment].items():
      parts: dict[str, Any] = {}
      for part in _PARTS:
        like = getattr(wanted, part)
        if like is None:
          parts[part] = None
          continue
        key = f'{name}/{part}'
        known.add(key)
        parts[part] = _as_wanted(key, arrays.get(key), like)
      encoded[name] = compression.Encoded(
        **parts, shape=wanted.shape, format=wanted.format, block=wanted.block
      )
    if extra := sorted(set(arrays) - known):
      raise messages.MessageError(
        f'array {extra[0]!r} is not of fragment {fragment}.'
      )
    self._check_indices(encoded)
    with on_cpu():
      return jax.device_get(_decode(encoded))

  def _check_indices(self, encoded: Mapping[str, Any]) -> None:
    for name, leaf in encoded.items():
      places = leaf.indices
      if places is None:
        continue
      if places.size and int(places.max()) >= leaf.block:
        raise messages.MessageError(
          f'array {name + "/indices"!r} must have places below {leaf.block}.'
        )


def check_whole(
  arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> Fragment:
  """A fragment that was sent as it is.

  Args:
    arrays: By leaf name.
    shapes: What they must be.

  Raises:
    messages.MessageError: If they are not.
  """
  if set(arrays) != set(shapes):
    raise messages.MessageError('the leaves must be those of the fragment.')
  for name, shape in shapes.items():
    if arrays[name].shape != shape or arrays[name].dtype != np.float32:
      raise messages.MessageError(
        f'leaf {name!r} must be float32{list(shape)}, is '
        f'{arrays[name].dtype}{list(arrays[name].shape)}.'
      )
  return {name: np.array(arrays[name]) for name in shapes}


def digest(fragment: Mapping[str, np.ndarray]) -> str:
  """Hash of names, shapes and bits, in hexadecimal."""
  found = hashlib.sha256()
  for name in sorted(fragment):
    values = np.ascontiguousarray(fragment[name], np.float32)
    found.update(f'{name}{list(values.shape)}'.encode())
    found.update(values.tobytes())
  return found.hexdigest()


def max_bytes(theta_P: Sequence[Fragment]) -> int:
  """What no message about these fragments exceeds."""
  sizes = [x.nbytes for part in theta_P for x in part.values()]
  return 2 * sum(sizes) + _HEADROOM_BYTES


def added(fragment: Fragment, move: Fragment) -> Fragment:
  """The fragment after a move; everybody adds alike."""
  return {name: x + move[name] for name, x in fragment.items()}


def shapes_of(fragment: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Shapes by leaf name."""
  return {name: tuple(x.shape) for name, x in fragment.items()}


def _as_plain(values: np.ndarray) -> np.ndarray:
  """Bits that a message can hold."""
  values = np.asarray(values)
  if values.dtype == jnp.bfloat16:
    return values.view(np.uint16)
  return values


def _as_wanted(key: str, values: np.ndarray | None, like: Any) -> np.ndarray:
  is_half = like.dtype == jnp.bfloat16
  dtype = np.dtype(np.uint16) if is_half else np.dtype(like.dtype)
  if values is None or values.shape != like.shape or values.dtype != dtype:
    found = 'absent'
    if values is not None:
      found = f'{values.dtype.name}{list(values.shape)}'
    raise messages.MessageError(
      f'array {key!r} must be {dtype.name}{list(like.shape)}, is {found}.'
    )
  return values.view(jnp.bfloat16) if is_half else values


def unpack_part(
  part: Any,
  message: messages.Message,
  *,
  theta_P: Sequence[Fragment],
  codec: Codec,
) -> tuple[int, int, Fragment]:
  """A part of the hub's message, as the fragment it makes.

  Args:
    part: What is said of it.
    message: With its arrays.
    theta_P: What the island has.
    codec: Of moves.

  Returns:
    Fragment, version, values.

  Raises:
    messages.MessageError: If it is not one, or makes another fragment than
      the hub has.
  """
  said = messages.Message('part', part if isinstance(part, dict) else {})
  fragment = said.integer('fragment', high=len(theta_P) - 1)
  version = said.integer('version')
  prefix = f'{fragment}/'
  arrays = {
    name.removeprefix(prefix): x
    for name, x in message.arrays.items()
    if name.startswith(prefix)
  }
  if said.text('form') == 'whole':
    shapes = shapes_of(theta_P[fragment])
    values = check_whole(arrays, shapes)
  else:
    move = codec.decode(arrays, fragment)
    values = added(theta_P[fragment], move)
  return fragment, version, values
