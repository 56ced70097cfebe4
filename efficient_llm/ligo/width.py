"""How the axes of width grow: matrices, and which places are new."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm.ligo import operator, pair
from efficient_llm.ligo.config import MethodConfig
from efficient_llm.models.config import TransformerConfig

_AXES = ('embed', 'mlp', 'kv_heads', 'heads')
# Which axis each map is of; the residual stream has several of its own.
_AXIS_OF = {
  'embed.out': 'embed',
  'embed.read': 'embed',
  'mlp.out': 'mlp',
  'mlp.read': 'mlp',
  'query.out': 'heads',
  'key.out': 'kv_heads',
  'value.out': 'kv_heads',
  'value.read': 'heads',
  'query.read': 'heads',
  'mix_logits.out': 'heads',
  'mix_logits.read': 'heads',
  'mix_weights.out': 'heads',
}
_AXIS_OF |= {
  f'{operator.CLASS_PREFIX}{name}': axis
  for name, axis in _AXIS_OF.items()
  if axis != 'embed'
}


@dataclasses.dataclass(frozen=True)
class Grown:
  """An axis that grows from `small` to `large` places.

  Attributes:
    out: [large, small], for what writes the axis.
    read: [large, small], for what reads it.
    is_new: [large], places that are no place of the small model.
    kind: The method's width: what new places hold.
    sources: [large], the place each is a copy of; None where there are none.
  """

  out: np.ndarray
  read: np.ndarray
  is_new: np.ndarray
  kind: str
  sources: np.ndarray | None = None


def grown_axes(
  method: MethodConfig,
  small: TransformerConfig,
  large: TransformerConfig,
  rng: np.random.Generator,
) -> dict[str, Grown]:
  """Those axes of 'embed', 'mlp', 'kv_heads' and 'heads' that grow.

  Args:
    method: How the operator begins.
    small: The small model.
    large: The large model, no axis of which is shorter.
    rng: For copies and mixtures.
  """

  def grow(num_small: int, num_large: int, *, residual: bool = False) -> Grown:
    return _grow(method, num_small, num_large, rng, residual=residual)

  found = {
    'embed': grow(small.embed_dim, large.embed_dim, residual=True),
    'mlp': grow(small.sizes['mlp'], large.sizes['mlp']),
    'kv_heads': grow(small.sizes['kv_heads'], large.sizes['kv_heads']),
  }
  group = grow(pair.group_size(small), pair.group_size(large))
  found['heads'] = _product(found['kv_heads'], group)
  return {name: axis for name, axis in found.items() if axis.is_new.any()}


def maps(
  axes: Mapping[str, Grown], *, only: Literal['old', 'new'] | None = None
) -> dict[str, np.ndarray]:
  """The matrices by name of `operator.MAPS`.

  Args:
    axes: From `grown_axes`.
    only: Written are the places of the small model alone, or the new ones.
  """
  found = {}
  for name, of in _AXIS_OF.items():
    if of in axes:
      role = name.split('.')[1]
      found[name] = axes[of].read if role == 'read' else axes[of].out
  if 'embed' in axes:
    found |= _norm_maps(axes['embed'])
  if only is None:
    return found
  for name in found:
    if not name.endswith('.read'):
      axis = axes[_AXIS_OF.get(name, 'embed')]
      kept = axis.is_new if only == 'new' else ~axis.is_new
      found[name] = found[name] * kept[:, None]
  return found


def is_new(
  axes: Mapping[str, Grown],
  names: Sequence[str | None],
  shape: Sequence[int],
) -> jax.Array:
  """Where a large leaf has no place of the small one, as 0 and 1.

  Args:
    axes: From `grown_axes`.
    names: The leaf's maps.
    shape: Of the large leaf.
  """
  found = np.zeros(shape, bool)
  for i, axis in _along(axes, names):
    found |= _on_axis(axis.is_new, i, shape)
  return jnp.asarray(found, jnp.float32)


def is_free(
  axes: Mapping[str, Grown],
  names: Sequence[str | None],
  shape: Sequence[int],
) -> jax.Array:
  """Where a large leaf may hold anything, as what it meets there is zero.

  Units inside a layer that nothing reads are free, and reading places of the
  residual stream that are at rest is. Arguments as for `is_new`.
  """
  free, closed = np.zeros(shape, bool), np.zeros(shape, bool)
  for i, axis in _along(axes, names):
    reads_rest = names[i] == 'embed.read'
    is_unread = names[i] != 'embed.out' and str(names[i]).endswith('.out')
    where = _on_axis(axis.is_new, i, shape)
    if axis.sources is None and (reads_rest or is_unread):
      free |= where
    else:
      closed |= where
  return jnp.asarray(free & ~closed, jnp.float32)


def without_sum(
  axes: Mapping[str, Grown], names: Sequence[str | None], leaf: jax.Array
) -> jax.Array:
  """Noise that what reads copies cannot tell from none.

  Args:
    axes: From `grown_axes`.
    names: The leaf's maps.
    leaf: Noise, which loses its mean over the copies of each unit.
  """
  found = jnp.zeros_like(leaf)
  for i, axis in _along(axes, names):
    if str(names[i]).endswith('.read') and axis.sources is not None:
      same = axis.sources[:, None] == axis.sources
      mean = jnp.asarray(same / same.sum(1, keepdims=True), leaf.dtype)
      found = leaf - jnp.moveaxis(
        jnp.tensordot(mean, leaf, axes=(1, i), precision='highest'), 0, i
      )
  return found


def _grow(
  method: MethodConfig,
  num_small: int,
  num_large: int,
  rng: np.random.Generator,
  *,
  residual: bool,
) -> Grown:
  """One axis; `residual` is that of the stream which all layers share."""
  kind = method.width
  places = np.arange(num_large)
  old = np.eye(num_large, num_small)
  new = places >= num_small
  if kind == 'copy':
    sources = places % num_small
    if method.copies == 'random':
      drawn = rng.integers(num_small, size=num_large)
      sources = np.where(new, drawn, places)
    out = np.eye(num_small)[sources]
    # Everything that reads a unit's copies gives what read the unit alone.
    shares = out / out.sum(0)
    return Grown(out, shares if method.split else out, new, kind, sources)
  if kind == 'mix':
    rows = rng.uniform(size=(num_large, num_small))
    rows /= rows.sum(1, keepdims=True)
    out = np.where(new[:, None], rows, old)
    return Grown(out, out, new, kind)
  out = old
  if kind == 'average' and residual:
    out = np.where(new[:, None], 1 / num_small, old)
  return Grown(out, old, new, kind)


def _product(kv_heads: Grown, group: Grown) -> Grown:
  """Query heads: those of every key/value head, one group behind the other."""
  sources = None
  if kv_heads.sources is not None and group.sources is not None:
    num_small = group.out.shape[1]
    sources = (kv_heads.sources[:, None] * num_small + group.sources).reshape(
      -1
    )
  return Grown(
    np.kron(kv_heads.out, group.out),
    np.kron(kv_heads.read, group.read),
    (kv_heads.is_new[:, None] | group.is_new).reshape(-1),
    group.kind,
    sources,
  )


def _norm_maps(axis: Grown) -> dict[str, np.ndarray]:
  """Of norms and gains on the residual stream, and of what a head reads."""
  if axis.kind in ('copy', 'mix'):
    return {
      'embed.norm': axis.out,
      'embed.norm_bias': axis.out,
      'embed.head': axis.read,
      'embed.head_bias': axis.read,
      'embed.gain': axis.out,
    }
  num_large, num_small = axis.out.shape
  # Where new places are at rest, the variance is that much smaller; a new
  # place's scale begins as the mean of all.
  at_rest = axis.kind != 'fresh'
  factor = (num_small / num_large) ** 0.5 if at_rest else 1.0
  old = np.eye(num_large, num_small)
  # Gains of new places too, as at zero nothing would ever come to them.
  mean = np.where(axis.is_new[:, None], 1 / num_small, old)
  scale = factor * mean
  return {
    'embed.norm': scale,
    'embed.norm_bias': old,
    'embed.head': scale,
    'embed.head_bias': old,
    'embed.gain': mean,
  }


def _along(
  axes: Mapping[str, Grown], names: Sequence[str | None]
) -> Iterator[tuple[int, Grown]]:
  """The leaf's axes that grow, with their place."""
  for i, name in enumerate(names):
    axis = axes.get(_AXIS_OF.get(name, 'embed')) if name else None
    if axis is not None:
      yield i, axis


def _on_axis(mask: np.ndarray, axis: int, shape: Sequence[int]) -> np.ndarray:
  """A mask of one axis, in a shape that spreads over the others."""
  sizes = [1] * len(shape)
  sizes[axis] = len(mask)
  return mask.reshape(sizes)
