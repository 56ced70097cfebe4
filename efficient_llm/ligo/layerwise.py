"""Growth inside the scan over layers: one large layer at a time."""

from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm import typing
from efficient_llm.ligo import operator as operator_lib
from efficient_llm.models import modules, transformer


def grow(
  config: transformer.TransformerConfig,
  params: Any,
  operator: operator_lib.Operator,
  *,
  num_layers: int,
) -> typing.Params:
  """As `operator.grow`, but each layer is made where the scan needs it.

  So neither the large model's layers nor their gradients ever exist all at
  once (`operator.added` does, where there is any). For forward and backward
  passes; `operator.grow` gives what can be kept.

  Args:
    config: The small model.
    params: Its parameters.
    operator: What is applied.
    num_layers: Of the large model.
  """
  axes = transformer.logical_axes(config)
  others = {name: x for name, x in params.items() if name != 'layers'}
  grown = operator_lib.grow_part(
    config,
    others,
    {name: axes[name] for name in others},
    operator.terms,
  )
  added = None
  if operator.added is not None:
    added = operator.added['layers']
    grown = {
      name: jax.tree.map(jnp.add, x, operator.added[name])
      for name, x in grown.items()
    }
  modules_of_layer = operator_lib.layer_modules(config)
  shared, parts = [], []
  for term in operator.terms:
    own = {name: x for name, x in term.width.items() if x.ndim == 3}
    shared.append({n: x for n, x in term.width.items() if n not in own})
    depth = term.depth or dict.fromkeys(modules_of_layer, jnp.eye(num_layers))
    parts.append((own, depth))

  def make(shared: Any, part: Any) -> typing.Params:
    small, widths = shared
    pieces, added = part
    terms = tuple(
      operator_lib.Term(
        {**width, **{name: x[None] for name, x in own.items()}},
        {module: row[None] for module, row in depth.items()},
      )
      for width, (own, depth) in zip(widths, pieces, strict=True)
    )
    tree = {'layers': small}
    layer = operator_lib.grow_part(
      config, tree, {'layers': axes['layers']}, terms
    )['layers']
    if added is not None:
      added = jax.tree.map(lambda x: x[None], added)
      layer = jax.tree.map(jnp.add, layer, added)
    return jax.tree.map(lambda x: x[0], layer)

  source = modules.LayerSource(
    make, (params['layers'], tuple(shared)), (tuple(parts), added)
  )
  return {**grown, 'layers': source}
