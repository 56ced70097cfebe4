"""The growth operator: matrices for named axes, applied to every leaf at once.

A leaf [layers, inputs, outputs] of the small model becomes

    M(leaf) = sum over terms of  w (x) A (x) B  applied to it,  + added

where w mixes layers (one matrix a module), A maps what the leaf reads and B
what it writes. No rule here knows a layer by its place: which matrix an axis
takes follows from its name, from whether the leaf reads or writes it, and from
the module that the leaf belongs to. So LiGO, StackBERT, Net2Net and others are
values of one `Operator`, and what is learned of it is a choice of leaves.

Heads grow, a head's size does not, so rotary pairs stay pairs.
Source: Wang et al. 2023, LiGO, equations 5 to 8, arXiv:2303.00980. Differs: A
need not be the transpose of B, without which no Net2Net is a special case.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm import typing
from efficient_llm.models import transformer

# Axes along which nothing grows.
_FIXED = ('vocab', 'positions', 'token_types', 'pixels', 'head_dim')
# What stands in layers of the class token has maps of its own, named so.
CLASS_PREFIX = 'class_'
_INSIDE_LAYERS = (
  'mlp.out',
  'mlp.read',
  'query.out',
  'key.out',
  'value.out',
  'value.read',
)
# What an axis may take; see `leaf_maps`.
MAPS = (
  'embed.out',
  'embed.read',
  'embed.norm',
  'embed.norm_bias',
  'embed.head',
  'embed.head_bias',
  'embed.gain',
  *_INSIDE_LAYERS,
  'query.read',
  'mix_logits.out',
  'mix_logits.read',
  'mix_weights.out',
  *(f'{CLASS_PREFIX}{name}' for name in _INSIDE_LAYERS),
)
# Whose heads a module reads: those that it is multiplied with or made of.
_HEADS_READ = {
  'out': 'value',
  'mix_logits': 'query',
  'mix_weights': 'mix_logits',
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
  """One product of matrices.

  Attributes:
    width: [large, small] by name of `MAPS`; [layers, large, small] for what is
      in layers alone, where every large layer has its own. An axis without one
      keeps its size. Heads may be mapped with their insides: [N H, N H].
    depth: [layers of the large, of the small] by module ('query', 'down' …);
      empty where the number of layers stays. Layers of the class token, which
      are a stack of their own, keep theirs.
  """

  width: Mapping[str, jax.Array]
  depth: Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operator:
  """What makes a large model's parameters of a small one's.

  Attributes:
    terms: Summed up; none where nothing of the small model is kept. Those
      behind the first are for what writes axes that grow; all else has the
      whole of itself in the first.
    added: Of the large model's structure: what is not made of the small model,
      such as new rows that start at random; None for nothing.
  """

  terms: tuple[Term, ...]
  added: Any = None


def identity() -> Operator:
  """The operator that returns the small model."""
  return Operator((Term({}, {}),))


def grow(
  config: transformer.TransformerConfig, params: Any, operator: Operator
) -> typing.Params:
  """Makes the large model's parameters.

  Args:
    config: The small model.
    params: Its parameters, or a tree of the same structure (moments).
    operator: What is applied.
  Returns:
    Float32, in the same structure.
  """
  if not operator.terms:
    return operator.added
  axes = transformer.logical_axes(config)
  grown = grow_part(config, params, axes, operator.terms)
  if operator.added is not None:
    grown = jax.tree.map(jnp.add, grown, operator.added)
  return grown


def grow_part(
  config: transformer.TransformerConfig,
  params: Any,
  axes: Any,
  terms: Sequence[Term],
) -> Any:
  """What terms make of some of the parameters, nothing added.

  Args:
    config: The small model.
    params: Some branches of its parameters, under their names.
    axes: Of the same branches.
    terms: Of an operator.
  """

  def grow_leaf(path: Any, leaf: jax.Array, axes: typing.LogicalAxes) -> Any:
    keys = keys_of(path)
    names = _maps_of(config, keys, axes)
    first, *others = terms
    grown = _apply(leaf, axes, names, keys[-2], first)
    for term in others:
      # What writes no axis that grows has all of itself in the first term.
      if any(name in term.width for name in names[-len(axes.outputs) :]):
        grown += _apply(leaf, axes, names, keys[-2], term)
    return grown

  return jax.tree_util.tree_map_with_path(grow_leaf, params, axes)


def leaf_maps(
  config: transformer.TransformerConfig,
) -> dict[str, tuple[str | None, ...]]:
  """For every leaf, by its path joined with slashes, the map of every axis.

  The axis of layers and those that never grow have None.
  """
  found = {}
  axes = transformer.logical_axes(config)
  for path, leaf in jax.tree_util.tree_flatten_with_path(axes)[0]:
    keys = keys_of(path)
    found['/'.join(keys)] = _maps_of(config, keys, leaf)
  return found


def maps_of_layers(config: transformer.TransformerConfig) -> set[str]:
  """Names of the maps that only leaves of layers take."""
  inside, outside = set(), set()
  for path, names in leaf_maps(config).items():
    found = inside if path.startswith('layers/') else outside
    found |= {name for name in names if name}
  return inside - outside


def layer_modules(config: transformer.TransformerConfig) -> list[str]:
  """Names of what stands in a layer, such as 'query' and 'mlp_norm'."""
  axes = transformer.logical_axes(config)['layers']
  paths = jax.tree_util.tree_flatten_with_path(axes)[0]
  return list(dict.fromkeys(keys_of(path)[-2] for path, _ in paths))


def keys_of(path: Any) -> list[str]:
  """The names along a path of a tree."""
  return [jax.tree_util.keystr((key,), simple=True) for key in path]


def square(operator: Operator) -> Operator:
  """The operator whose matrices are squared element by element, for variances.

  Exact for independent elements of mean zero: the variance of a weighted sum
  has the squared weights.
  """
  terms = jax.tree.map(jnp.square, operator.terms)
  return Operator(terms)


def _maps_of(
  config: transformer.TransformerConfig,
  keys: Sequence[str],
  axes: typing.LogicalAxes,
) -> tuple[str | None, ...]:
  """The map of each axis of a leaf."""
  before = [None] * len(axes.stack)

  def name_of(axis: str, role: str) -> str | None:
    if axis in _FIXED:
      return None
    if axis == 'embed':
      return _embed_map(config, keys, role)
    if axis in ('heads', 'kv_heads'):
      axis = _HEADS_READ[keys[-2]] if role == 'read' else keys[-2]
    prefix = CLASS_PREFIX if axes.stack == ('class_layers',) else ''
    return f'{prefix}{axis}.{role}'

  reads = [name_of(axis, 'read') for axis in axes.inputs]
  writes = [name_of(axis, 'out') for axis in axes.outputs]
  return (*before, *reads, *writes)


def _embed_map(
  config: transformer.TransformerConfig, keys: Sequence[str], role: str
) -> str:
  module, kind = keys[-2:]
  if module.endswith('gain'):
    return 'embed.gain'
  if role == 'read' or not module.endswith('norm'):
    return f'embed.{role}'
  # A tied table cannot be mapped as a matrix that reads: the norm before it is.
  last = 'head' if config.mlm_head else 'final_norm'
  is_before_head = config.tie_embeddings and keys[0] == last
  name = 'embed.head' if is_before_head else 'embed.norm'
  return name if kind == 'scale' else f'{name}_bias'


def _apply(
  leaf: jax.Array,
  axes: typing.LogicalAxes,
  names: Sequence[str | None],
  module: str,
  term: Term,
) -> jax.Array:
  """One term of one leaf, all axes in one einsum."""
  matrices = [term.width.get(name) if name else None for name in names]
  joined = next(
    (
      i
      for i, matrix in enumerate(matrices)
      if matrix is not None and matrix.shape[-1] != leaf.shape[i]
    ),
    None,
  )
  head_dim = 1
  if joined is not None:
    # Heads mapped together with their insides, which are the next axis.
    head_dim = leaf.shape[joined + 1]
    leaf = leaf.reshape(*leaf.shape[:joined], -1, *leaf.shape[joined + 2 :])
    del matrices[joined + 1]
  if axes.stack == ('layers',) and module in term.depth:
    matrices[0] = term.depth[module]
  small = [chr(ord('a') + i) for i in range(leaf.ndim)]
  large = [
    s if matrix is None else s.upper()
    for s, matrix in zip(small, matrices, strict=True)
  ]
  operands, subscripts = [leaf], [''.join(small)]
  for i, matrix in enumerate(matrices):
    if matrix is not None:
      # Matrices of every layer share the axis of layers.
      of_layer = large[0] if matrix.ndim == 3 else ''
      operands.append(matrix)
      subscripts.append(of_layer + large[i] + small[i])
  grown = leaf
  if len(operands) > 1:
    grown = jnp.einsum(
      f'{",".join(subscripts)}->{"".join(large)}',
      *operands,
      optimize='optimal',
      precision=jax.lax.Precision.HIGHEST,
    )
  if joined is not None:
    before, after = grown.shape[:joined], grown.shape[joined + 1 :]
    grown = grown.reshape(*before, -1, head_dim, *after)
  return grown
