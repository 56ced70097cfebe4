"""Parameters in the form in which few tokens at a time are fastest."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from efficient_llm.models import projection, transformer
from efficient_llm.models.config import TransformerConfig
from efficient_llm.typing import Params


def prepare(config: TransformerConfig, params: Params) -> Params:
  """Layers unstacked, matrices in the type of the activations.

  On a CPU the kernels of one input are joined and transposed.

  Args:
    config: The model.
    params: From `init`; those from here come back as they are.
  """
  params = transformer.unstack_layers(params)
  if jax.default_backend() == 'cpu':
    joined = tuple(_join(block) for block in params['layers'])
    params = {**params, 'layers': joined}
  dtype = jnp.dtype(config.dtype)
  return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)


def _join(block: Params) -> Params:
  """A block's parameters with the kernels of one input joined.

  Args:
    block: Of one layer; joined ones come back as they are.
  """

  def joined(module: Params, names: Sequence[str], num_inputs: int) -> Params:
    kernels = [module[name]['kernel'] for name in names]
    module = dict(module)
    for name in names:
      # The others' share is in the first one.
      module[name] = {**module[name], 'kernel': jnp.zeros(0)}
    module[names[0]]['kernel'] = projection.transpose(kernels, num_inputs)
    return module

  attention, mlp = block['attention'], block['mlp']
  if isinstance(attention['out']['kernel'], projection.Transposed):
    return block
  attention = joined(attention, ('query', 'key', 'value'), 1)
  attention = joined(attention, ('out',), 2)
  mlp = joined(mlp, ('up', 'gate') if 'gate' in mlp else ('up',), 1)
  mlp = joined(mlp, ('down',), 1)
  return {**block, 'attention': attention, 'mlp': mlp}
