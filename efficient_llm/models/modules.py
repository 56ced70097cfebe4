"""Flax NNX modules as functions on nested dicts: make, bind, logical_axes.

And layers that are made inside the scan, in place of stacked ones.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx

from efficient_llm.models import block, embedding, layers, vision
from efficient_llm.models.config import TransformerConfig
from efficient_llm.typing import Array, Params

Kind = Literal[
  'embedding',
  'image_embedding',
  'block',
  'bare_block',
  'class_block',
  'norm',
  'head',
]

_MODULES = {
  'embedding': embedding.Embedding,
  'image_embedding': vision.Embedding,
  'block': block.Block,
  'bare_block': block.BareBlock,
  'class_block': vision.ClassBlock,
  'norm': layers.Norm,
  'head': embedding.Head,
}


def make(kind: Kind, config: TransformerConfig, key: Array) -> Params:
  """Makes the parameters of one module.

  Args:
    kind: Which module.
    config: The model.
    key: A typed random key.
  """
  module = _MODULES[kind](config, rngs=nnx.Rngs(params=key))
  return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def bind(kind: Kind, config: TransformerConfig, params: Params) -> Any:
  """The module with these parameters, ready to be called.

  Args:
    kind: Which module.
    config: The model.
    params: From `make`.
  """
  return nnx.merge(_structure(kind, config)[0], params)


def logical_axes(kind: Kind, config: TransformerConfig) -> dict[str, Any]:
  """A LogicalAxes for every parameter that `make` gives.

  Args:
    kind: Which module.
    config: The model.
  """
  return _structure(kind, config)[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerSource:
  """Makes layers one by one inside the scan over them.

  Stands where stacked layers do; no more than one of them ever exists.

  With remat the backward pass makes each layer again in place of keeping it.

  Attributes:
    make: (shared, one layer's part) -> the parameters of that layer.
    shared: What every layer is made of.
    parts: Stacked along the leading axis, a part for each layer.
  """

  make: Callable[[Any, Any], Params] = dataclasses.field(
    metadata={'static': True}
  )
  shared: Any
  parts: Any


def unpack_layers(layers: Any) -> tuple[Callable[[Any], Params], Any]:
  """What makes a layer of its part, and the parts to scan over.

  Args:
    layers: A `LayerSource`, or stacked layers, which are their own parts.
  """
  if isinstance(layers, LayerSource):
    return functools.partial(layers.make, layers.shared), layers.parts
  return lambda part: part, layers


@functools.lru_cache(maxsize=64)
def _structure(kind: Kind, config: TransformerConfig) -> tuple[Any, Any]:
  """NNX graph definition and logical axes of one module."""
  make_module = functools.partial(_MODULES[kind], config)
  abstract = nnx.eval_shape(lambda: make_module(rngs=nnx.Rngs(0)))
  graph, state = nnx.split(abstract, nnx.Param)
  axes = jax.tree.map(
    lambda variable: variable.get_metadata()['axes'],
    state,
    is_leaf=lambda x: isinstance(x, nnx.Variable),
  )
  return graph, nnx.to_pure_dict(axes)
