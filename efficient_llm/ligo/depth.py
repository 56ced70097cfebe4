"""From which small layers a layer of the large model comes."""

import numpy as np

from efficient_llm.ligo import operator
from efficient_llm.ligo.config import MethodConfig
from efficient_llm.models.config import TransformerConfig

# What adds to the residual stream.
_WRITING = ('out', 'down')


def matrices(
  method: MethodConfig,
  small: TransformerConfig,
  large: TransformerConfig,
  rng: np.random.Generator,
) -> dict[str, np.ndarray]:
  """[layers of the large, of the small] for every module of a layer.

  Args:
    method: How the operator begins.
    small: The small model.
    large: The large model, of at least as many layers.
    rng: For noise.
  """
  num_small, num_large = small.num_layers, large.num_layers
  if num_small == num_large and not method.advanced:
    return {}
  found = {}
  if method.depth == 'append':
    first = np.eye(num_large, num_small)
    return dict.fromkeys(operator.layer_modules(small), first)
  sources = _sources(method.depth, num_small, num_large)
  chosen = np.eye(num_small)[sources]
  for module in operator.layer_modules(small):
    matrix = chosen
    if method.depth == 'identity' and module in _WRITING:
      is_first = np.concatenate([[True], sources[1:] != sources[:-1]])
      matrix = chosen * is_first[:, None]
    if method.depth_noise:
      noise = rng.uniform(0, method.depth_noise, chosen.shape)
      matrix = matrix + np.where(chosen > 0, 0, noise)
      matrix = matrix / matrix.sum(1, keepdims=True)
    found[module] = matrix
  return found


def old_layers(
  method: MethodConfig, small: TransformerConfig, large: TransformerConfig
) -> tuple[int, ...]:
  """Layers of the large model that are the small one's, each once."""
  if method.depth == 'append':
    return tuple(range(small.num_layers))
  sources = _sources(method.depth, small.num_layers, large.num_layers)
  return tuple(np.unique(sources, return_index=True)[1].tolist())


def from_above(layers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Each small layer replaced by the one above it, the last by itself."""
  found = {}
  for module, matrix in layers.items():
    num_small = matrix.shape[1]
    above = np.minimum(np.arange(num_small) + 1, num_small - 1)
    found[module] = matrix @ np.eye(num_small)[above]
  return found


def _sources(how: str, num_small: int, num_large: int) -> np.ndarray:
  """The small layer of every large one."""
  places = np.arange(num_large)
  if not num_small:
    raise ValueError(
      f'A small model without layers leaves method.depth={how!r} none to take; '
      'choose --config.method=append.'
    )
  if how == 'stack':
    return places % num_small
  if how in ('interpolate', 'identity'):
    return places * num_small // num_large
  if how == 'top':
    found = list(range(num_small))
    while len(found) < num_large:
      # A stage at most doubles the model.
      found += found[-min(len(found), num_large - len(found)) :]
    return np.asarray(found)
  if num_large > 2 * num_small:
    raise ValueError(
      f"method.depth='overlap' makes at most {2 * num_small} layers of "
      f"{num_small}, not {num_large}; use 'stack'."
    )
  cut = (2 * num_small - num_large) // 2
  rest = 2 * num_small - num_large - cut
  below = np.arange(num_small - cut)
  return np.concatenate([below, np.arange(rest, num_small)])
